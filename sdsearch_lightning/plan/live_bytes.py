"""How many bytes of tensors are alive, and were at most: seen by watching every operation make and drop storage.

Works on fake tensors, which have sizes but no memory, as well as on real ones.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts storage that operations inside make, until the last tensor on it is gone; what was there before is free.

    What an operation's kernel makes and drops within itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = self._known | _storages((args, kwargs)).keys()
        result = func(*args, **(kwargs or {}))
        for key, storage in _storages(result).items():
            if key not in known:
                self._add(key, storage)
        return result

    def _add(self, key: int, storage: torch.UntypedStorage) -> None:
        self._known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self._known.remove(key)
        self.now -= size


def _storages(values: Any) -> dict[int, torch.UntypedStorage]:
    """Of all tensors in `values`, each once, by its address."""
    storages = (leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))
    return {storage._cdata: storage for storage in storages}
