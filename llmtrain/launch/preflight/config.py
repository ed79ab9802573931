"""What a start looks at before anything is loaded, and what it takes for wrong. stdlib only."""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.errors import ConfigError


@dataclass(kw_only=True)
class PreflightConfig:
    """What a start asks of ranks, hosts and the network between them before anything is loaded, and what it
    takes for wrong. Rank 0's settings are everybody's."""

    enabled: bool = True
    idle_nodes: bool = False
    """Whether nodes of a Slurm job may stay without ranks, as in an elastic launch that lost one."""
    max_clock_skew_s: float = 1.0
    """Difference from the clock of rank 0's host above which a host is warned of."""
    max_lookup_s: float = 1.0
    """Time to resolve a name above which a host is warned of: ranks resolve many when they meet."""
    min_free_gib: float = 1.0
    """Of the file systems written to; one that has no room for a checkpoint is an error at any setting."""
    min_free_inodes: int = 10_000
    min_shared_memory_mib: float = 64.0
    """Of /dev/shm, for each rank of a host with GPUs. Assumed, not measured: containers often have 64
    altogether, and NCCL then fails between ranks of a host."""
    max_gpu_celsius: float = 75.0
    """Of a GPU that has nothing to do yet."""
    max_gpu_used_gib: float = 4.0
    """Memory in use before anything is loaded: a rank's context and NCCL's buffers take less."""
    max_gpu_memory_errors: int = 0
    """Uncorrected ones since the driver was loaded; more are an error."""
    storage_mib: int = 16
    """Written, read back, and read of the data, by each host, at most; never more than a checkpoint of the
    run. 0: no measurement."""
    storage_s: float = 0.5
    """Longest that each of these may take, flushing aside."""
    min_storage_mb_per_s: float = 20.0
    """MB/s of writing or reading below which a host is warned of."""
    all_reduce_mib: int | None = None
    """Bytes that the measured all-reduce sums; null: 64 MiB on GPUs, 4 MiB on CPUs. 0: no measurement."""
    network_s: float = 2.0
    """After so long no more links between ranks are measured."""
    min_bus_gb_per_s: float | None = None
    """GB/s of bus bandwidth of the slowest rank in an all-reduce (all_reduce_mib, nccl-tests' convention)
    below which the run does not start; null: any."""
    slow_ratio: float = 5.0
    """So many times slower than others of its kind makes a host, a rank or a link worth a warning."""
    answer_s: float = 30.0
    """A file system, name server or driver that takes longer counts as not answering."""

    def __post_init__(self) -> None:
        for name in ("storage_s", "network_s", "answer_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"preflight.{name}={getattr(self, name)} must be above 0 seconds")
        if self.storage_mib < 0 or (self.all_reduce_mib or 0) < 0:
            raise ConfigError(
                f"preflight.storage_mib={self.storage_mib} and preflight.all_reduce_mib="
                f"{self.all_reduce_mib} must be at least 0, which leaves the measurement out"
            )
        if self.slow_ratio <= 1:
            raise ConfigError(
                f"preflight.slow_ratio={self.slow_ratio} must be above 1: nothing is slower than itself"
            )
