"""Units on a Dask cluster of separate processes, some of them killed."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import dask
import pytest
import unit_functions as units
from dask_cluster import Cluster, dask_cluster

from llmtrain.data.engines import dask as ours
from llmtrain.data.engines.config import DaskConfig, EngineConfig, EngineKind
from llmtrain.data.engines.engine import Engine, make_engine
from llmtrain.errors import DataError, LaunchError

WORKERS_COME_S = 60.0


def engine_on(cluster: Cluster, **settings: object) -> Engine:
    return make_engine(
        EngineConfig(
            kind=EngineKind.dask_address,
            dask=DaskConfig(address=cluster.address, worker_timeout_s=WORKERS_COME_S, **settings),
        )
    )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with dask_cluster(tmp_path_factory.mktemp("dask"), 2) as started:
        yield started


@pytest.fixture
def engine(cluster: Cluster) -> Iterator[Engine]:
    with engine_on(cluster) as connected:
        yield connected


def test_results_come_in_the_order_of_the_units_whatever_finishes_first(engine: Engine) -> None:
    assert list(engine.map(units.double_later, range(30))) == [2 * number for number in range(30)]
    assert list(engine.map(units.double, [])) == []
    assert 10 << 20 < engine.peak_worker_bytes() < 4 << 30


def test_few_units_are_in_flight_at_a_time_and_all_are_done(cluster: Cluster) -> None:
    with engine_on(cluster, max_in_flight=3) as engine:
        assert list(engine.map(units.double, range(20))) == [2 * number for number in range(20)]


def test_an_error_of_llmtrain_ends_the_map_at_once_and_the_engine_goes_on(engine: Engine) -> None:
    with pytest.raises(DataError, match=r"^unit 5 is bad: mend it$") as caught:
        list(engine.map(units.fail_at_five, range(400)))
    assert "in fail_at_five" in str(caught.value.__cause__)
    assert list(engine.map(units.double, [4])) == [8]


def test_an_exception_that_cannot_be_pickled_is_told_in_words(engine: Engine) -> None:
    with pytest.raises(RuntimeError, match=r"^Odd: a and b$"):
        list(engine.map(units.fail_oddly, [0]))


def test_errors_of_the_operating_system_are_tried_again_and_keep_their_number(
    engine: Engine, tmp_path: Path
) -> None:
    assert list(engine.map(units.shaky_disk, [str(tmp_path / "once")])) == ["read"]
    with pytest.raises(OSError, match="No space left on device") as caught:
        list(engine.map(units.full_disk, [0]))
    assert caught.value.errno == errno.ENOSPC


def test_workers_change_to_the_folder_of_the_run(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with engine_on(cluster) as engine:
        assert set(engine.map(units.where_am_i, range(6))) == {str(tmp_path)}


def test_a_shared_folder_is_checked_and_left_as_it_was(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    engine.share(tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 1
    assert list(engine.map(units.double, [1, 2])) == [2, 4]
    engine.close()
    assert not list((tmp_path / "out").iterdir())


def test_one_worker_killed_in_the_middle_costs_nothing_but_its_unit(tmp_path: Path) -> None:
    work = [(str(tmp_path), number) for number in range(40)]
    with dask_cluster(tmp_path / "dask", 2) as cluster, engine_on(cluster) as engine:
        list(engine.map(units.double, range(4)))
        assert list(engine.map(units.die_once, work)) == list(range(40))
        killed = [worker for worker in cluster.workers if worker.poll() is not None]
        assert [worker.returncode for worker in killed] == [-9]
    assert {(tmp_path / f"{number}.txt").read_text() for number in range(40)} == {
        str(number * number) for number in range(40)
    }


def test_a_unit_that_kills_its_workers_is_named_and_the_others_live(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with dask_cluster(tmp_path, 4, allowed_failures=1) as cluster, engine_on(cluster) as engine:
        wait_for_workers(cluster, 4)
        with pytest.raises(
            DataError, match=r"^2 workers died with unit 2 of 3 of die_at_two, 2; the last was"
        ):
            list(engine.map(units.die_at_two, range(3)))
        assert list(engine.map(units.double, [7])) == [14]
    assert (
        "gives up on a unit after 2 lost workers, fewer than engine.dask.allowed_failures=10" in caplog.text
    )


def wait_for_workers(cluster: Cluster, num_workers: int) -> None:
    client = ours.client_of(address=cluster.address)
    try:
        client.wait_for_workers(num_workers, timeout=WORKERS_COME_S)
    finally:
        client.close()


def test_a_lost_scheduler_is_told_and_so_is_that_nothing_done_is_lost(tmp_path: Path) -> None:
    said, never = tmp_path / "said", tmp_path / "never"
    with dask_cluster(tmp_path / "dask", 1) as cluster, engine_on(cluster) as engine:
        results = engine.map(units.wait_for, [(str(said), str(said)), (str(said), str(never))])
        next(results)
        cluster.scheduler.kill()
        with pytest.raises(
            DataError, match=r"scheduler is gone, with 1 of 2 units left; what is done stays done: the same"
        ):
            next(results)


def test_a_scheduler_without_workers_is_waited_for_and_then_given_up(tmp_path: Path) -> None:
    with dask_cluster(tmp_path, 0) as cluster:
        settings = DaskConfig(scheduler_file=str(cluster.scheduler_file), worker_timeout_s=0.5)
        cfg = EngineConfig(kind=EngineKind.dask_address, dask=settings)
        with (
            make_engine(cfg) as engine,
            pytest.raises(
                LaunchError, match=r"no worker for \d+ s, and 3 units wait; start some with `dask w"
            ),
        ):
            list(engine.map(units.double, range(3)))


def test_a_worker_with_threads_is_refused_before_the_first_unit(tmp_path: Path) -> None:
    with dask_cluster(tmp_path, 1, worker_options=("--nthreads", "2")) as cluster:
        wait_for_workers(cluster, 1)
        with pytest.raises(LaunchError, match=r"computes with 2 threads, .* start it with --nthreads 1"):
            engine_on(cluster)


def test_a_scheduler_with_other_versions_is_refused(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = {**ours.own_versions(), "numpy": "1.26.0"}
    monkeypatch.setattr(ours, "own_versions", lambda: elsewhere)
    with pytest.raises(LaunchError, match=r"scheduler has other versions .*: numpy 1\.26\.0 here, 2\."):
        engine_on(cluster)


def test_a_worker_with_other_versions_is_refused(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    wait_for_workers(cluster, 2)
    elsewhere = {**ours.own_versions(), "numpy": "1.26.0"}
    monkeypatch.setattr(ours, "own_versions", lambda: elsewhere)
    monkeypatch.setattr(ours.Dask, "_check_scheduler", lambda engine: None)
    with pytest.raises(
        LaunchError, match=r"worker tcp://127.* on .* has other versions .*: numpy 1\.26\.0 h"
    ):
        engine_on(cluster)


def test_a_worker_that_joins_late_looks_before_its_first_unit(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_for_workers(cluster, 2)
    elsewhere = {**ours.own_versions(), "numpy": "1.26.0"}
    monkeypatch.setattr(ours, "own_versions", lambda: elsewhere)
    monkeypatch.setattr(ours.Dask, "_check_scheduler", lambda engine: None)
    monkeypatch.setattr(ours.Dask, "_check_workers", lambda engine: None)
    with engine_on(cluster) as engine, pytest.raises(LaunchError, match=r"numpy 1\.26\.0 here, 2\."):
        list(engine.map(units.double, range(3)))


def home(**changes: object) -> ours.Home:
    values = {"token": "t", "versions": ours.own_versions(), "working_folder": os.getcwd()}
    return ours.Home(**{**values, **changes})


def test_a_worker_that_does_not_see_the_shared_folder_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "PROBE_PAUSE_S", 0.001)
    found = ours._look_around(home(shared_folder=str(tmp_path)), "tcp://w on h", 1)
    assert found is not None
    assert f"worker tcp://w on h does not see what this process wrote to {tmp_path}; out must be" in found


def test_a_worker_that_may_not_write_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ours.probe_name("t")).touch()
    assert ours._look_around(home(shared_folder=str(tmp_path)), "w", 1) is None
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    found = ours._look_around(home(shared_folder=str(tmp_path)), "w", 1)
    assert found == f"worker w may not write to {tmp_path}; check whom it runs as, and the mount"


def test_no_scheduler_at_the_address_is_told_with_how_to_start_one(tmp_path: Path) -> None:
    for settings, message in [
        (
            {"address": "tcp://127.0.0.1:1"},
            r"no Dask scheduler answers at tcp://127.0.0.1:1 \(.*start one with",
        ),
        ({"scheduler_file": str(tmp_path / "no.json")}, r"scheduler_file=.*no.json is not there; start a"),
    ]:
        cfg = EngineConfig(kind=EngineKind.dask_address, dask=DaskConfig(**settings))
        with (
            dask.config.set({"distributed.comm.timeouts.connect": "0.2s"}),
            pytest.raises(LaunchError, match=message),
        ):
            make_engine(cfg)


def test_a_map_that_is_left_early_calls_off_the_rest(engine: Engine) -> None:
    results = engine.map(units.double_later, range(1000))
    assert next(results) == 0
    results.close()
    assert list(engine.map(units.double, [1])) == [2]


def move_to_a_module_that_is_only_here(function: object, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("not_there")
    setattr(module, function.__name__, function)
    monkeypatch.setitem(sys.modules, "not_there", module)
    monkeypatch.setattr(function, "__module__", "not_there")


def test_a_scheduler_that_lacks_a_package_is_refused(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    move_to_a_module_that_is_only_here(ours.about_scheduler, monkeypatch)
    with pytest.raises(LaunchError, match=r"^the Dask scheduler cannot import not_there; start it with this"):
        engine_on(cluster)


def test_a_worker_that_lacks_a_package_is_refused(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    wait_for_workers(cluster, 2)
    move_to_a_module_that_is_only_here(ours.complaint_about_worker, monkeypatch)
    with pytest.raises(
        LaunchError, match=r"^worker .* cannot be used: ModuleNotFoundError\(.No module named"
    ):
        engine_on(cluster)


def test_what_workers_cannot_import_is_named(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    move_to_a_module_that_is_only_here(units.double, monkeypatch)
    with pytest.raises(LaunchError, match=r"cannot import not_there, for unit 0 of 1 of double, 1; start"):
        list(engine.map(units.double, [1]))
