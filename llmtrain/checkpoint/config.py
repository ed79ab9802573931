"""When a run saves, and which of its checkpoints stay. stdlib only."""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.errors import ConfigError


@dataclass(kw_only=True)
class SaveConfig:
    folder: str | None = None
    """Where checkpoints go: a folder, or a URL that fsspec opens (s3://, gs://, ...), of this run alone;
    null: checkpoints/ of the run folder."""
    every_steps: int = 1000
    """Steps between checkpoints; one is also saved after the last step and at a stop signal."""
    in_background: bool = True
    """Whether training goes on while a checkpoint is written: it waits only while its state is copied to host
    memory, and for the checkpoint before, if that is not written yet. Takes as much host memory as this
    rank's part of a checkpoint. false: training waits until it is on the disk."""
    memory_every_steps: int = 0
    """Steps between snapshots in the memory of each host, for a run that is started again after a process
    died: it goes on from there if that is newer than what is on the disk. 0: none. The newest one stays, and
    takes a checkpoint's bytes of its host's ranks; while the next is written, twice that."""
    memory_folder: str = "/dev/shm"
    """A folder in memory, of each host alone."""
    exit_wait_s: float = 600.0
    """Seconds that the end of a run waits for a save under way; then it ends without it, with an error."""
    check_loss: bool = True
    """Whether a checkpoint has the loss of a few held-out rows, and a resume compares it with what it
    computes itself before the first step. Costs a forward pass of a micro batch."""
    keep_last: int = 2
    """Newest checkpoints that stay; the last verified one is never deleted."""
    keep_every_tokens: int = 0
    """Beside them, the first checkpoint at or after every multiple of so many tokens; 0: none."""
    keep_best: int = 0
    """Beside them, so many with the lowest held-out loss, of those that were evaluated at their step."""

    def __post_init__(self) -> None:
        if self.folder == "":
            raise ConfigError("save.folder is empty; name a folder or a URL, or set it to null")
        for name in ("every_steps", "keep_last"):
            if getattr(self, name) < 1:
                raise ConfigError(f"save.{name}={getattr(self, name)} must be at least 1")
        if not self.exit_wait_s > 0:
            raise ConfigError(f"save.exit_wait_s={self.exit_wait_s} must be above 0 seconds")
        for name in ("keep_every_tokens", "keep_best", "memory_every_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"save.{name}={getattr(self, name)} must not be negative; 0 switches it off"
                )
