"""What this rank hands to collectives, heard where all of torch.distributed's functions end: at the methods
of ProcessGroup, whatever name DeepSpeed or FSDP2 call them by, and at Work.wait, where ranks wait.

Not heard is DistributedDataParallel, whose all-reduces never come through Python, and what NCCL does after a
call has returned: there `returned` says that the host went on, not that the GPU is done. The Flight Recorder
knows both.
"""

from __future__ import annotations

import os
import re
import threading
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic_ns
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.tracking.beats import Collective, Group
from llmtrain.tracking.black_box import KEPT, BlackBox

TOLD = 64
"""The newest collectives, which each beat tells; all that a black box keeps once something is wrong."""

_first: Callable[..., Sequence[Tensor]] = lambda tensors, *_: tensors  # noqa: E731
_second: Callable[..., Sequence[Tensor]] = lambda output, told, *_: [told]  # noqa: E731

METHODS: dict[str, tuple[str, Callable[..., Sequence[Tensor]]]] = {
    "allreduce": ("all_reduce", _first),
    "allreduce_coalesced": ("all_reduce", _first),
    "reduce": ("reduce", _first),
    "broadcast": ("broadcast", _first),
    "allgather": ("all_gather", lambda outputs, told, *_: told),
    "allgather_coalesced": ("all_gather", lambda outputs, told, *_: told),
    "all_gather_single": ("all_gather_single", _second),
    "_allgather_base": ("all_gather_single", _second),
    "all_gather_single_coalesced": ("all_gather_single", lambda outputs, told, *_: told),
    "allgather_into_tensor_coalesced": ("all_gather_single", lambda outputs, told, *_: told),
    "gather": ("gather", lambda outputs, told, *_: told),
    "scatter": ("scatter", _first),
    "reduce_scatter": ("reduce_scatter", lambda outputs, told, *_: told[0]),
    "reduce_scatter_single": ("reduce_scatter_single", _second),
    "_reduce_scatter_base": ("reduce_scatter_single", _second),
    "reduce_scatter_single_coalesced": ("reduce_scatter_single", lambda outputs, told, *_: told),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter_single", lambda outputs, told, *_: told),
    "all_to_all_single": ("all_to_all", _second),
    "alltoall_base": ("all_to_all", _second),
    "alltoall": ("all_to_all", lambda outputs, told, *_: told),
    "barrier": ("barrier", lambda *_: ()),
    "send": ("send", _first),
    "recv": ("recv", _first),
    "recv_anysource": ("recv", _first),
}
"""Method of ProcessGroup -> its kind, and which of its arguments this rank brings."""
FLIGHT_RECORDS = 2000
"""Collectives that the Flight Recorder keeps."""
LOST = re.compile(r"gloo|nccl|c10d|connection (closed|reset|refused)|timed out|watchdog", re.IGNORECASE)
"""In the text of an error that came out of a collective."""


class _Slot:
    """A group and what this rank did in it."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.name = str(group.group_name)
        self.size = group.size()
        self.count = 0
        self.ranks: list[int] = dist.get_process_group_ranks(group)
        described = str(group.group_desc)
        is_named = described not in ("", "undefined", "default_pg")
        self.label = "world" if group is dist.group.WORLD else described if is_named else f"group {self.name}"


class Collectives:
    """Hears every collective of more than one rank between `install` and `remove`.

    Those of a thread of ours beside the main one, which saves while training goes on, are counted in their
    group and nothing else. Autograd's threads work for the main one.
    """

    def __init__(self, place: Callable[[], tuple[int, int, str]], box: BlackBox) -> None:
        """
        Args:
            place: the step, micro-step and phase under way.
            box: where the main thread's are noted, too.
        """
        self._place = place
        self._box = box
        self._main = threading.get_ident()
        self._slots: dict[dist.ProcessGroup, _Slot] = {}
        self._open: dict[int, Collective] = {}
        """Work of which nobody has waited for the end, by id: a Work takes no attributes."""
        self._last: deque[Collective] = deque(maxlen=KEPT)
        self._states: dict[int, str] = {}
        """Of those that have not returned, by number."""
        self._number = 0
        self._waiting: tuple[Collective, int] | None = None
        self.waited_ns = 0
        """By the main thread, inside of collectives, since the start."""
        self._failure: BaseException | None = None
        self._before: dict[str, Any] = {}
        self._wait: Any = None

    # -- what it knows

    def last(self, most: int = TOLD) -> list[Collective]:
        """The newest, the oldest first."""
        states = dict(self._states)
        return [call._replace(state=states.get(call.number, "returned")) for call in list(self._last)[-most:]]

    def waiting(self) -> tuple[Collective, float] | None:
        """The collective that the main thread is in, and for how many seconds."""
        found = self._waiting
        return found and (found[0], (monotonic_ns() - found[1]) * 1e-9)

    def groups(self, *, with_ranks: bool = False) -> dict[str, Group]:
        return {
            slot.name: Group(slot.size, slot.count, slot.label, slot.ranks if with_ranks else None)
            for slot in list(self._slots.values())
        }

    @property
    def count(self) -> int:
        return self._number

    def is_cause_of(self, error: BaseException) -> bool:
        """Whether `error` came out of a collective: another rank may be to blame."""
        seen: BaseException | None = error
        while seen is not None:
            if seen is self._failure or isinstance(seen, dist.DistError):
                return True
            if isinstance(seen, RuntimeError) and LOST.search(str(seen)):
                return True  # raised in C++, by DistributedDataParallel
            seen = seen.__cause__ or seen.__context__
        return False

    # -- how it hears

    def install(self) -> None:
        for name, (kind, brought) in METHODS.items():
            self._before[name] = vars(dist.ProcessGroup)[name]  # as bound to instances
            setattr(dist.ProcessGroup, name, self._heard(name, kind, brought))
        work = dist.distributed_c10d.Work
        self._wait = vars(work)["wait"]
        setattr(work, "wait", self._heard_wait(work.wait))  # noqa: B010  mypy: a method

    def remove(self) -> None:
        for name, method in self._before.items():
            setattr(dist.ProcessGroup, name, method)
        if self._wait is not None:
            setattr(dist.distributed_c10d.Work, "wait", self._wait)  # noqa: B010
        self._before, self._wait = {}, None
        self._slots.clear()
        self._open.clear()

    def _heard(self, name: str, kind: str, brought: Callable[..., Sequence[Tensor]]) -> Callable[..., Any]:
        method = getattr(dist.ProcessGroup, name)
        is_between_two = kind in ("send", "recv")

        def call(group: dist.ProcessGroup, *arguments: Any, **options: Any) -> Any:
            slot = self._slots.get(group)
            if slot is None:
                slot = self._slots[group] = _Slot(group)
            if slot.size == 1:
                return method(group, *arguments, **options)
            slot.count += not is_between_two
            if self._is_background():
                return method(group, *arguments, **options)
            begin = monotonic_ns()
            elements = sum(tensor.numel() for tensor in brought(*arguments))
            peer = None
            if is_between_two:
                peer = -1 if name == "recv_anysource" else slot.ranks[arguments[1]]
            self._number = number = self._number + 1
            heard = Collective(number, slot.name, slot.count, kind, elements, peer, *self._place(), "waits")
            self._last.append(heard)
            self._box.note_call(heard)
            self._states[number] = "waits"
            self._waiting = heard, begin
            try:
                work = method(group, *arguments, **options)
            except BaseException as error:
                self._fail(heard, error)
                raise
            finally:
                self._waiting = None
                self.waited_ns += monotonic_ns() - begin
            if work is None:
                self._return(heard)
            else:
                if len(self._open) > 4 * TOLD:
                    self._open.clear()  # somebody issues, and never waits
                    self._states.clear()
                self._states[number] = "issued"
                self._open[id(work)] = heard
            return work

        return call

    def _heard_wait(self, wait: Callable[..., Any]) -> Callable[..., Any]:
        def call(work: Any, *arguments: Any, **options: Any) -> Any:
            heard = self._open.pop(id(work), None)
            if heard is None or self._is_background():
                return wait(work, *arguments, **options)
            begin = monotonic_ns()
            self._states[heard.number] = "waits"
            self._waiting = heard, begin
            try:
                found = wait(work, *arguments, **options)
            except BaseException as error:
                self._fail(heard, error)
                raise
            finally:
                self._waiting = None
                self.waited_ns += monotonic_ns() - begin
            self._return(heard)
            return found

        return call

    def _return(self, heard: Collective) -> None:
        self._states.pop(heard.number, None)
        self._box.note_state(heard.number, "returned")

    def _fail(self, heard: Collective, error: BaseException) -> None:
        self._failure = error
        self._states[heard.number] = "failed"
        self._box.note_state(heard.number, "failed")

    def _is_background(self) -> bool:
        if threading.get_ident() == self._main:
            return False
        return not isinstance(threading.current_thread(), threading._DummyThread)


def keep_flight_record() -> None:
    """Before ranks meet: have torch's Flight Recorder remember, unless the environment says how much."""
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:  # its old name
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(FLIGHT_RECORDS))


def flight_record(backend: str) -> bytes | None:
    """The Flight Recorder's own record of this process, for `torchfrtrace`; None where there is none."""
    module = torch._C._distributed_c10d
    dump = getattr(module, "_dump_nccl_trace" if backend == "nccl" else "_dump_fr_trace", None)
    return None if dump is None else bytes(dump())
