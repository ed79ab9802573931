"""Jobs as workers: the script that Slurm gets, and real jobs on a Slurm of the test's own (slow)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_cluster as real
import unit_functions as units

from llmtrain.data.engines import dask as ours
from llmtrain.data.engines import slurm
from llmtrain.data.engines.config import EngineConfig, EngineKind, SlurmConfig
from llmtrain.data.engines.engine import make_engine
from llmtrain.errors import ConfigError, LaunchError

SCRIPT = """\
#!/usr/bin/env bash

#SBATCH -J dask-worker
#SBATCH -e {logs}/dask-worker-%J.err
#SBATCH -o {logs}/dask-worker-%J.out
#SBATCH -p cpu
#SBATCH -A research
#SBATCH -n 1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH -t 08:30:00
#SBATCH --qos=low
export OMP_NUM_THREADS=1
export OPENBLAS_NUM_THREADS=1
export MKL_NUM_THREADS=1
export NUMBA_NUM_THREADS=1
export DASK_DISTRIBUTED__WORKER__MEMORY__TARGET=False
export DASK_DISTRIBUTED__WORKER__MEMORY__SPILL=False
export DASK_DISTRIBUTED__WORKER__MEMORY__PAUSE=False
export DASK_DISTRIBUTED__WORKER__MEMORY__TERMINATE=0.95
export DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED=False
module load python
/opt/python -m distributed.cli.dask_worker tcp://10.0.0.7:8786 --name jobs-0 --nthreads 1 \
--memory-limit 8.00GiB --nworkers 8 --nanny --death-timeout 60 --local-directory /scratch \
--lifetime 26010s --lifetime-stagger 1530s --no-dashboard --interface ib0
"""


def test_the_script_of_a_job_is_what_its_settings_say(tmp_path: Path) -> None:
    cfg = SlurmConfig(
        queue="cpu", account="research", cores=16, processes=8, memory_gib=64, walltime_hours=8.5,
        extra_directives=["--qos=low"], prologue=["module load python"], interface="ib0",
        local_directory="/scratch", python="/opt/python",
    )  # fmt: skip
    job = slurm.load_jobqueue().slurm.SLURMJob(
        scheduler="tcp://10.0.0.7:8786", name="jobs-0", **slurm.job_arguments(cfg, tmp_path / "logs")
    )
    assert job.job_script() == SCRIPT.format(logs=tmp_path / "logs")


def test_without_sbatch_the_two_ways_out_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"needs the command sbatch .*, or start workers .*dask_address"):
        make_engine(EngineConfig(kind=EngineKind.dask_slurm))


def test_loading_what_asks_for_jobs_leaves_ctrl_c_as_it_is() -> None:
    program = """
import signal
from llmtrain.data.engines import slurm
before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
slurm.load_jobqueue()
assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, script: str) -> None:
    (tmp_path / command).write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / command).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


def test_a_refusal_is_told_in_slurms_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    say(tmp_path, monkeypatch, "sbatch", "echo 'error: no such account' >&2; exit 1")
    with pytest.raises(
        LaunchError, match=r"^Slurm refuses the job .*: error: no such account; mend its sett"
    ):
        slurm.check_job("#!/bin/sh")


def test_a_slurm_that_does_not_answer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    say(tmp_path, monkeypatch, "sbatch", "exec sleep 60")
    monkeypatch.setattr(slurm, "ASK_S", 0.2)
    with pytest.raises(LaunchError, match=r"^Slurm does not answer within 0 s; is its controller up\?"):
        slurm.check_job("#!/bin/sh")


def test_a_queue_that_cannot_be_read_for_a_moment_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    say(tmp_path, monkeypatch, "squeue", "exit 1")
    assert slurm.live_jobs() is None
    assert "Slurm does not say which jobs there are" in caplog.text
    say(tmp_path, monkeypatch, "squeue", "printf '12\\n14\\n'")
    assert slurm.live_jobs() == {"12", "14"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    reason = real.why_not()
    if reason is not None:
        pytest.skip(reason)
    with real.slurm_cluster(tmp_path_factory.mktemp("slurm") / "state", num_nodes=2) as environment:
        yield environment


@pytest.fixture
def cfg(cluster: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EngineConfig]:
    """Two jobs of two processes, on a Slurm without other jobs."""
    here = [str(Path(units.__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, here)))
    monkeypatch.setenv("SLURM_CONF", cluster["SLURM_CONF"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ours, "TEND_S", 1.0)
    yield EngineConfig(
        kind=EngineKind.dask_slurm,
        slurm=SlurmConfig(
            queue="main", cores=2, memory_gib=2, walltime_hours=0.05, max_jobs=2, interface="lo",
            local_directory=str(tmp_path), log_directory=str(tmp_path / "logs"),
        ),
    )  # fmt: skip
    real.wait_until(lambda: not real.slurm(cluster, "squeue", "-h"))


def jobs(cluster: dict[str, str]) -> list[str]:
    """Ids of the jobs that run."""
    return real.slurm(cluster, "squeue", "-h", "--states=RUNNING", "-o", "%i").split()


@pytest.mark.slow
def test_units_run_as_jobs_and_survive_a_killed_worker_and_a_cancelled_job(
    cluster: dict[str, str], cfg: EngineConfig, tmp_path: Path
) -> None:
    with make_engine(cfg) as engine:
        engine.share(tmp_path / "out")
        work = [(str(tmp_path / "out"), number) for number in range(40)]
        assert list(engine.map(units.die_once, work)) == list(range(40))
        assert {(tmp_path / f"out/{number}.txt").read_text() for number in range(40)} == {
            str(number * number) for number in range(40)
        }
        real.wait_until(lambda: len(jobs(cluster)) == 2)
        first = jobs(cluster)
        results = engine.map(units.double_later, range(400))
        assert next(results) == 0
        real.slurm(cluster, "scancel", first[0])
        assert list(results) == [2 * number for number in range(1, 400)]
        while first[0] in jobs(cluster) or len(jobs(cluster)) < 2:  # a new one is asked for during a map
            list(engine.map(units.double_later, range(20)))
        assert len(set(jobs(cluster)) - set(first)) == 1
        assert engine.peak_worker_bytes() > 10 << 20
    real.wait_until(lambda: not jobs(cluster))


@pytest.mark.slow
def test_jobs_whose_time_is_up_are_followed_by_others(
    cluster: dict[str, str], cfg: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "LIFETIME", 0.05)  # 9 s of 180
    monkeypatch.setattr(slurm, "STAGGER", 0.01)
    seen: set[str] = set()
    with make_engine(cfg) as engine:
        while len(seen) < 6:
            assert list(engine.map(units.double_later, range(20))) == [2 * number for number in range(20)]
            seen.update(jobs(cluster))
    logs = "".join(path.read_text() for path in Path(cfg.slurm.log_directory).glob("*.err"))
    assert "worker-lifetime-reached" in logs
    assert "DUE TO TIME LIMIT" not in logs


@pytest.mark.slow
def test_a_partition_that_is_not_there_is_told_before_any_work(cfg: EngineConfig) -> None:
    cfg.slurm.queue = "nope"
    with pytest.raises(
        LaunchError, match=r"(?s)^Slurm refuses the job .*: sbatch: error: invalid partition spe"
    ):
        make_engine(cfg)


@pytest.mark.slow
def test_jobs_that_end_at_once_are_not_asked_for_for_ever(cfg: EngineConfig) -> None:
    cfg.slurm.python = "/nonexistent/python"
    with (
        make_engine(cfg) as engine,
        pytest.raises(
            LaunchError, match=r"jobs ended one after the other without a unit done; their messages"
        ),
    ):
        list(engine.map(units.double, range(3)))
    logs = "".join(path.read_text() for path in Path(cfg.slurm.log_directory).glob("*.err"))
    assert "/nonexistent/python" in logs


KILLED = """
import sys
import unit_functions
from llmtrain.data.engines.config import EngineConfig, EngineKind, SlurmConfig
from llmtrain.data.engines.engine import make_engine

cfg = SlurmConfig(memory_gib=1, walltime_hours=1, interface="lo", local_directory=".")
with make_engine(EngineConfig(kind=EngineKind.dask_slurm, slurm=cfg)) as engine:
    list(engine.map(unit_functions.wait_for, [("said", "never")]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_jobs_of_a_run_that_ends_end_with_it(
    cluster: dict[str, str], cfg: EngineConfig, tmp_path: Path, how: signal.Signals
) -> None:
    run = subprocess.Popen([sys.executable, "-c", KILLED], cwd=tmp_path, stderr=subprocess.DEVNULL)
    real.wait_until(lambda: (tmp_path / "said").exists())
    assert len(jobs(cluster)) == 1
    run.send_signal(how)
    assert run.wait(60) == -how
    real.wait_until(lambda: not jobs(cluster), within_s=180)  # Dask's workers give up after 60
