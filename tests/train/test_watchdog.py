"""Who is odd, by the beats of all ranks; when a main thread stands still for too long; what is a false alarm.

The ranks of tests/dist/test_hangs.py are real; here every case that can be told apart has a test."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmtrain.errors import ConfigError
from llmtrain.tracking import black_box
from llmtrain.tracking.beats import Beat, Collective, Group, own_start, process_state, this_machine
from llmtrain.train import watchdog as watchdog_module
from llmtrain.train.autopsy import Condition, Verdict, first_difference, judge, names
from llmtrain.train.heartbeat import Heartbeat
from llmtrain.train.watchdog import HangLimits, Watchdog, condition_of, kill_here, prepare, probe

ALIVE = Condition.alive


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Black boxes in the test's own folder."""
    monkeypatch.setattr(black_box, "MEMORY", tmp_path)


def call(
    number: int, kind: str = "all_reduce", elements: int = 8, step: int = 3, **changes: Any
) -> Collective:
    found = Collective(number, "0", number, kind, elements, None, step, 0, "agree", "returned")
    return found._replace(**changes)


def beat_of(rank: int, *, last: list[Collective] | None = None, **changes: Any) -> Beat:
    """A rank that has joined three collectives of the world, and computes."""
    last = [call(1), call(2), call(3)] if last is None else last
    ranks = list(range(changes.get("world_size", 4)))
    beat = Beat(
        token="t",
        attempt=1,
        rank=rank,
        world_size=4,
        host=f"node{rank}",
        machine="m",
        pid=100 + rank,
        born=1,
        work="",
        alive=5,
        every_s=1.0,
        step=3,
        micro_step=1,
        phase="forward",
        age_s=60.0,
        num_marks=9,
        position=16,
        num_rows=8,
        num_collectives=len(last),
        waiting=None,
        waiting_s=0.0,
        num_steps=2,
        seconds={},
        waited={},
        is_exact=True,
        groups={"0": Group(4, max((each.in_group for each in last), default=0), "world", ranks)},
        last=last,
    )
    return replace(beat, **changes)


def waiting(rank: int, number: int = 4, **changes: Any) -> Beat:
    """The same, but that it waits in its next collective."""
    entry = call(number, state="waits")
    return beat_of(rank, last=[call(1), call(2), call(3), entry], waiting=entry, **changes)


def verdict_of(beats: list[Beat], world_size: int = 4, **conditions: Condition) -> Verdict:
    """Of `beats`, whose ranks live but for `conditions`: r1=Condition.gone."""
    known = dict.fromkeys(range(world_size), ALIVE)
    known |= {int(name[1:]): condition for name, condition in conditions.items()}
    return judge({beat.rank: beat for beat in beats}, known, world_size=world_size, cause="an alarm")


def odd_of(verdict: Verdict) -> dict[int, str]:
    return {odd.rank: odd.reason for odd in verdict.odd}


def test_the_rank_that_all_others_wait_for_is_odd() -> None:
    verdict = verdict_of([waiting(0), waiting(1), beat_of(2), waiting(3)])
    assert odd_of(verdict) == {
        2: "is at step 3, micro-step 1, forward since 1:00, and ranks 0, 1 and 3 wait for it"
    }
    assert verdict.waits == [
        "ranks 0, 1 and 3: in all_reduce of 8 elements in step 3, agree over world (number 4 there), where "
        "rank 2 did not come"
    ]
    assert "rank 2 (node2, process 102) is at step 3" in verdict.sentence
    assert verdict.odd[0].rows == (16, 23)
    assert verdict.sentence in verdict.text()


def test_a_rank_that_waits_itself_is_not_to_blame_for_those_who_wait_for_it() -> None:
    """0 waits for 1 in a pair of theirs, and 1 for 2: 2 is the end of the chain."""
    pair = {"0": Group(4, 3, "world", [0, 1, 2, 3]), "a": Group(2, 1, "tp", [0, 1])}
    entry = call(4, group="a", in_group=1, state="waits")
    first = beat_of(0, waiting=entry, last=[entry], groups=pair)
    second = waiting(1, groups={"0": Group(4, 4, "world", [0, 1, 2, 3]), "a": Group(2, 0, "tp", [0, 1])})
    verdict = verdict_of([first, second, beat_of(2), waiting(3)])
    assert list(odd_of(verdict)) == [2]


def test_who_waits_for_a_message_waits_for_its_sender() -> None:
    receive = call(4, "recv", peer=3, state="waits", in_group=3)
    beats = [beat_of(0, waiting=receive, last=[receive]), waiting(1), waiting(2), beat_of(3)]
    verdict = verdict_of(beats)
    assert list(odd_of(verdict)) == [3]
    assert (
        "rank 0: in recv of 8 elements in step 3, agree with rank 3, where rank 3 did not come"
        in verdict.waits
    )


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        (Condition.gone, "is gone without a word"),
        (Condition.stopped, "is stopped"),
        (Condition.stuck, "runs no Python any more"),
        (Condition.in_kernel, "is in the kernel (state D)"),
        (Condition.unheard, "is not heard any more"),
    ],
)
def test_a_process_that_is_no_more_comes_before_all_else(condition: Condition, words: str) -> None:
    odd = odd_of(verdict_of([waiting(0), beat_of(1), waiting(2), beat_of(3, step=2)], r3=condition))
    assert list(odd) == [3]
    assert odd[3].startswith(words)


def test_a_rank_without_a_beat_is_named() -> None:
    verdict = verdict_of([waiting(0), waiting(1), waiting(2)], r3=Condition.absent)
    assert odd_of(verdict)[3].startswith("has told nothing in this launch")
    assert verdict.sentence == f"step 3: rank 3 {odd_of(verdict)[3]}"


def test_an_error_of_its_own_comes_before_those_it_takes_along() -> None:
    failed = call(4, state="failed")
    others = [
        beat_of(rank, end="collective", error="RuntimeError: closed", last=[call(3), failed])
        for rank in (0, 1)
    ]
    cause = beat_of(2, end="error", error="ValueError: 7")
    verdict = verdict_of([*others, cause, beat_of(3)], r2=Condition.gone, r3=Condition.gone)
    assert odd_of(verdict) == {2: "left with an error: ValueError: 7"}
    assert verdict.waits[0].startswith("ranks 0 and 1: failed in all_reduce")


def test_a_rank_that_has_left_is_odd() -> None:
    assert odd_of(verdict_of([waiting(0), waiting(1), beat_of(2, end="well"), waiting(3)])) == {
        2: "has left the run"
    }


def test_the_minority_at_the_first_difference_is_odd() -> None:
    broadcast = call(4, "broadcast", state="waits")
    strange = beat_of(1, last=[call(1), call(2), call(3), broadcast], waiting=broadcast)
    verdict = verdict_of([waiting(0), strange, waiting(2), waiting(3)])
    assert odd_of(verdict) == {
        1: "called broadcast of 8 elements in step 3, agree as collective 4 of world, where ranks 0, 2 and 3 "
        "called all_reduce of 8 elements in step 3, agree"
    }
    assert verdict.difference is not None
    assert verdict.difference.in_group == 4
    assert "first difference: collective 4 of group world" in verdict.text()


def test_of_two_ranks_the_one_whose_step_is_not_as_before_is_odd() -> None:
    """Each step is a, b, c; rank 1 left out c of step 3."""
    kinds = ("all_reduce", "broadcast", "barrier")
    usual = [call(3 * step + at + 1, kind, step=step) for step in range(4) for at, kind in enumerate(kinds)]
    whole = [*usual[:11], usual[11]._replace(state="waits")]
    short = [*usual[:11], call(12, "all_reduce", step=4, state="waits")]
    groups = {"0": Group(2, 12, "world", [0, 1])}
    beats = [
        beat_of(rank, last=last, waiting=last[-1], groups=groups, world_size=2, step=last[-1].step)
        for rank, last in enumerate((whole, short))
    ]
    verdict = verdict_of(beats, 2)
    assert list(odd_of(verdict)) == [1]
    assert "called all_reduce of 8 elements in step 4" in odd_of(verdict)[1]
    assert "where rank 0 called barrier" in odd_of(verdict)[1]
    gone = verdict_of(beats, 2, r0=Condition.gone)
    assert list(odd_of(gone)) == [1], "what ended rank 0 inside of a collective was rank 1's other one"


def test_of_two_ranks_that_cannot_be_told_apart_both_are_named() -> None:
    beats = [
        beat_of(rank, last=[entry], waiting=entry, groups={"0": Group(2, 1, "world", [0, 1])}, world_size=2)
        for rank, entry in enumerate((call(1, state="waits"), call(1, "broadcast", state="waits")))
    ]
    odd = odd_of(verdict_of(beats, 2))
    assert list(odd) == [0, 1]
    assert odd[0].endswith("where rank 1 did not, and which is right cannot be seen")


def test_the_same_call_in_another_step_is_a_difference() -> None:
    """Who left out one of several like it is found where the others end their step."""
    behind = call(4, step=2, state="waits")
    beats = [waiting(0), waiting(1), waiting(2), beat_of(3, last=[call(1), behind], waiting=behind)]
    odd = odd_of(verdict_of(beats))
    assert list(odd) == [3]
    assert "called all_reduce of 8 elements in step 2, agree as collective 4 of world" in odd[3]


def test_several_minorities_are_all_odd() -> None:
    kinds = {0: "barrier", 1: "broadcast", 2: "all_reduce", 3: "all_reduce"}
    entries = {rank: call(4, kind, state="waits") for rank, kind in kinds.items()}
    beats = [beat_of(rank, last=[call(3), entry], waiting=entry) for rank, entry in entries.items()]
    odd = odd_of(verdict_of(beats))
    assert list(odd) == [0, 1]
    assert all("where ranks 2 and 3 called all_reduce" in reason for reason in odd.values())


def test_sizes_that_may_differ_are_no_difference() -> None:
    beats = {rank: beat_of(rank, last=[call(1, "all_gather", rank + 1)]) for rank in (0, 1)}
    assert first_difference(beats) is None
    beats = {rank: beat_of(rank, last=[call(1, "all_reduce", rank + 1)]) for rank in (0, 1)}
    assert first_difference(beats) is not None


def test_where_nobody_is_seen_to_wait_the_rank_that_has_joined_least_is_odd() -> None:
    """As on GPUs, whose collectives return at once."""
    fewer = beat_of(2, last=[call(1), call(2)])
    odd = odd_of(verdict_of([beat_of(0), beat_of(1), fewer, beat_of(3)]))
    assert list(odd) == [2]
    assert odd[2].endswith("has joined 2 collectives of world, of which others have joined 3")


def test_where_nothing_else_tells_the_rank_that_is_not_as_far_is_odd() -> None:
    """As under DistributedDataParallel; of another pipeline stage nothing can be told by that."""
    beats = [beat_of(rank, phase="backward", micro_step=2) for rank in range(4)]
    beats[2] = beat_of(2, phase="forward", micro_step=2)
    beats[3] = beat_of(3, phase="update", micro_step=0)
    odd = odd_of(verdict_of(beats))
    assert odd == {
        2: "is at step 3, micro-step 2, forward since 1:00, where others are at step 3, update since 1:00"
    }
    beats[2] = replace(beats[2], work="pp_stage 1")
    assert list(odd_of(verdict_of(beats))) == [0, 1]


def test_a_host_that_lost_its_link_is_odd() -> None:
    beats = [waiting(0), waiting(1, links_down=["eth0"]), waiting(2), waiting(3)]
    assert odd_of(verdict_of(beats)) == {1: "lives, and its host lost the network: no carrier on eth0"}


def test_the_smaller_part_of_hosts_that_do_not_reach_each_other_is_odd() -> None:
    reached = {0: {"3": False, "1": True}, 1: {"2": True}, 2: {"0": True}, 3: {"0": False, "1": False}}
    beats = [waiting(rank, reached=reached[rank], address=(f"10.0.0.{rank}", 1)) for rank in range(4)]
    verdict = verdict_of(beats)
    assert list(odd_of(verdict)) == [3]
    assert "(node3) and that of ranks 0 to 2 do not reach each other" in odd_of(verdict)[3]
    assert verdict.hosts == [
        "rank 0 on node0 could not reach rank 3",
        "rank 3 on node3 could not reach ranks 0 and 1",
    ]


def test_two_hosts_cut_apart_name_the_one_without_rank_0() -> None:
    beats = [
        waiting(rank, reached={str(1 - rank): False}, address=(f"10.0.0.{rank}", 1), world_size=2)
        for rank in range(2)
    ]
    assert list(odd_of(verdict_of(beats, 2))) == [1]


def test_ranks_of_one_host_are_of_one_part() -> None:
    beats = [waiting(rank, reached={"2": True}, address=("10.0.0.1", rank)) for rank in (0, 1)]
    beats += [waiting(rank, address=("10.0.0.2", rank)) for rank in (2, 3)]
    verdict = verdict_of(beats)
    assert odd_of(verdict) == {}
    assert "all 4 ranks live and stand at the same collective" in verdict.sentence


def test_where_all_stand_in_one_place_the_stack_of_the_first_is_shown() -> None:
    stack = ["a.py:1 in read: data.result()"]
    beats = [beat_of(rank, phase="data", micro_step=0, stacks=[("main thread", stack)]) for rank in range(4)]
    verdict = verdict_of(beats)
    assert verdict.odd == []
    assert verdict.sentence == "step 3: all 4 ranks live and stand still, at step 3, data"
    assert stack[0] in verdict.text()


def test_the_text_of_many_ranks_is_short() -> None:
    world = {"world_size": 100, "groups": {"0": Group(100, 4, "world", list(range(100)))}}
    late = {**world, "groups": {"0": Group(100, 3, "world", None)}}
    beats = [waiting(rank, **world) if rank != 70 else beat_of(70, **late) for rank in range(100)]
    verdict = verdict_of(beats, 100)
    assert list(odd_of(verdict)) == [70]
    assert len(verdict.text().splitlines()) < 20
    assert "the other 99 ranks are in the .json" in verdict.text()
    assert len(verdict.as_json()["ranks"]) == 100


def test_names_of_ranks_are_short() -> None:
    assert names([3]) == "rank 3"
    assert names([0, 2]) == "ranks 0 and 2"
    assert names([0, 1, 2, 3, 7]) == "ranks 0 to 3 and 7"
    assert names(range(0, 100, 2)) == "ranks 0, 2, 4, 6, 8, 10, 12, 14 and 42 more"


def test_conditions_are_seen_by_counters_and_by_the_process() -> None:
    mine = beat_of(1, machine=this_machine(), pid=os.getpid(), born=own_start())
    assert condition_of(1, {1: mine}, {1: replace(mine, alive=6)}, me=0) is Condition.alive
    assert condition_of(1, {1: mine}, {1: mine}, me=0) is Condition.stuck, (
        "this process runs, its beat does not"
    )
    assert condition_of(1, {1: mine}, {1: replace(mine, born=0)}, me=0) is Condition.gone, "another process"
    elsewhere = replace(mine, machine="another")
    assert condition_of(1, {1: elsewhere}, {1: elsewhere}, me=0) is Condition.unheard
    assert condition_of(1, {}, {}, me=0) is Condition.absent


def test_only_the_process_that_was_meant_is_killed() -> None:
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    state = process_state(child)
    assert state is not None
    kill_here([["another machine", child, state[1]], [this_machine(), child, state[1] + 1]])
    kill_here([[this_machine(), os.getpid(), own_start()]])
    assert process_state(child) is not None
    kill_here([[this_machine(), child, state[1]]])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_hosts_are_probed_at_the_ports_that_they_told() -> None:
    with socket.socket() as there, socket.socket() as closed:
        for each in (there, closed):
            each.bind(("127.0.0.1", 0))
        there.listen()
        mine = beat_of(0, address=("10.9.9.9", 1))
        beats = {0: mine, 1: beat_of(1, address=there.getsockname()), 2: beat_of(2), 3: beat_of(3)}
        assert probe(mine, beats) == {"1": True}
        beats[1] = beat_of(1, address=closed.getsockname())
        assert probe(mine, beats) == {"1": False}
        del beats[0]
        assert probe(replace(mine, address=("127.0.0.1", 1)), beats) == {}, "one host"


# -- the watch


def heartbeat_in(folder: Path, **changes: Any) -> Heartbeat:
    settings = {"token": "t", "attempt": 1, "rank": 0, "world_size": 1, "every_s": 0.02}
    return Heartbeat(folder / "ranks", **settings | changes)


def watchdog_of(heartbeat: Heartbeat, folder: Path, *, timeout_s: float, long_s: float) -> Watchdog:
    limits = HangLimits(timeout_s, long_s)
    return Watchdog(heartbeat, limits, run_folder=folder, metrics=folder / "metrics.jsonl", backend="gloo")


def test_limits_are_long_for_the_first_time_and_for_what_is_known_to_be_slow(tmp_path: Path) -> None:
    heartbeat = heartbeat_in(tmp_path, world_size=2)
    watchdog = watchdog_of(heartbeat, tmp_path, timeout_s=10, long_s=40)
    assert watchdog.limit_s() == float("inf"), "starting, and in no collective"
    entry = call(1, state="waits")
    heartbeat.collectives._waiting = entry, time.monotonic_ns()
    assert watchdog.limit_s() == 40
    heartbeat.collectives._waiting = None
    heartbeat.mark("forward")
    assert watchdog.limit_s() == 40, "it may compile"
    heartbeat.mark("backward")
    heartbeat.mark("forward")
    assert watchdog.limit_s() == 10
    heartbeat._longest_ns["forward"] = 5_000_000_000
    assert watchdog.limit_s() == 20, "four times what it takes"
    heartbeat._longest_ns["forward"] = 50_000_000_000
    assert watchdog.limit_s() == 40, "before collectives give up"
    heartbeat.world_size = 1
    assert watchdog.limit_s() == 200, "for one process there are none"
    heartbeat.mark("save")
    assert watchdog.limit_s() == float("inf")
    heartbeat.box.remove()


def fall(watchdog: Watchdog, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note an end in place of it."""
    causes: list[str] = []

    def end(self: Watchdog, cause: str) -> None:
        causes.append(cause)
        self._is_over.set()

    monkeypatch.setattr(Watchdog, "_end", end)
    return causes


def test_a_main_thread_that_stands_still_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with heartbeat_in(tmp_path) as heartbeat:
        watchdog = watchdog_of(heartbeat, tmp_path, timeout_s=0.4, long_s=30)
        causes = fall(watchdog, monkeypatch)
        for step in (1, 2):
            heartbeat.begin_step(step, position=0, num_rows=8)
            heartbeat.mark("forward", micro_step=1)
        with watchdog:
            assert watchdog._is_over.wait(30)
        assert causes[0].startswith("rank 0 has stood still for 0.")
        assert causes[0].endswith("s, at step 2, micro-step 1, forward")


def test_a_slow_save_is_named_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), heartbeat_in(tmp_path) as heartbeat:
        watchdog = watchdog_of(heartbeat, tmp_path, timeout_s=0.3, long_s=1)
        causes = fall(watchdog, monkeypatch)
        heartbeat.begin_step(9, position=0, num_rows=8)
        heartbeat.mark("save")
        with watchdog:
            time.sleep(2.5)
        assert causes == []
    told = [record.getMessage() for record in caplog.records]
    assert 1 <= len(told) <= 5, "each time after twice as long"
    assert "rank 0 has been at step 9, save for" in told[0]
    assert "time.sleep(2.5)" in told[0]


def test_time_in_which_the_whole_process_was_stopped_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clocks jump by an hour between two ticks."""
    hours, ticks = itertools.count(), itertools.count()
    monkeypatch.setattr(watchdog_module.time, "monotonic", lambda: 3600.0 * next(hours))
    with heartbeat_in(tmp_path) as heartbeat:
        watchdog = watchdog_of(heartbeat, tmp_path, timeout_s=5, long_s=5)
        causes = fall(watchdog, monkeypatch)
        heartbeat.begin_step(1, position=0, num_rows=8)
        monkeypatch.setattr(watchdog._is_over, "wait", lambda timeout: next(ticks) == 4)
        watchdog._watch()
        assert next(hours) > 4
        assert causes == []


def test_an_alarm_of_another_launch_is_not_heard(tmp_path: Path) -> None:
    folder = tmp_path / "ranks"
    prepare(folder, world_size=2)
    before, now = (
        watchdog_of(heartbeat_in(tmp_path, token=token, world_size=2), tmp_path, timeout_s=9, long_s=9)
        for token in ("before", "now")
    )
    before._write_note("alarm", cause="x")
    now._listen_for_alarm()
    assert now._heard == {}
    now._write_note("alarm", cause="y")
    now._listen_for_alarm()
    assert now._heard["cause"] == "y"
    prepare(folder, world_size=2)
    assert now._read_note("alarm") == {}, "a new launch begins without"
    now.heartbeat.box.remove()


def test_without_a_folder_a_rank_says_its_own_stack_and_judges_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "ranks").write_text("a file")
    with caplog.at_level(logging.WARNING), heartbeat_in(tmp_path, world_size=2) as heartbeat:
        watchdog = watchdog_of(heartbeat, tmp_path, timeout_s=9, long_s=9)
        prepare(heartbeat.folder, world_size=2)
        watchdog._explain_all("rank 0 has stood still")
    told = [record.getMessage() for record in caplog.records]
    assert any("rank 0 has stood still; its main thread: " in line for line in told)
    assert told[-1].startswith("rank 0 cannot explain it: ")
    assert not (tmp_path / "hangs").exists()


def test_files_of_ranks_that_are_no_more_are_removed_at_the_start(tmp_path: Path) -> None:
    for name in ("rank-00001.beat", "rank-00007.beat", "rank-00007.stuck"):
        (tmp_path / name).write_text("")
    prepare(tmp_path, world_size=2)
    assert sorted(path.name for path in tmp_path.glob("rank-*")) == ["rank-00001.beat"]


def test_an_error_that_every_rank_has_is_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with heartbeat_in(tmp_path, world_size=2) as heartbeat:
        watchdog = watchdog_of(heartbeat, tmp_path, timeout_s=30, long_s=30)
        causes = fall(watchdog, monkeypatch)
        watchdog.explain(ConfigError("said on all ranks"))
        assert causes == []
        assert heartbeat.beat().end is None
        watchdog.explain(RuntimeError("[gloo/pair.cc:1] Connection closed by peer"))
        assert causes == ["rank 0 has met an error: RuntimeError: [gloo/pair.cc:1] Connection closed by peer"]
        assert heartbeat.beat().end == "collective"
    heartbeat.box.remove()
