"""Memory of a piece of work, counted operation by operation: the same figure on every machine."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # of torch's __init_subclass__
    """Bytes of the storages that operations inside have touched and that are alive, each once; and the most
    of them at once. What a kernel takes for itself is not seen."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self._alive: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_iter((args, kwargs, out)):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self._see(leaf.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        seen, before = self._alive.get(key, (None, 0))
        if num_bytes != before or seen is None:  # new, or resized
            self.now += num_bytes - before
            reference = seen or weakref.ref(storage, lambda _: self._forget(key))
            self._alive[key] = (reference, num_bytes)

    def _forget(self, key: int) -> None:
        self.now -= self._alive.pop(key)[1]
