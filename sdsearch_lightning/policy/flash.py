"""Attention over sequences back to back in one kernel: torch's own flash attention, in half precision on CUDA.

The keys of each sequence stand together, and its queries are the last of its keys. The reference is a call
per sequence (attention.py, rollout/kv_rows.py), which is what other devices and precisions do.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from sdsearch_lightning.policy.placing import Place, plainly

MAX_WIDTH = 256
"""Numbers of a key, at most."""


class Places(NamedTuple):
    """Where sequences end, among queries and among keys."""

    limits: Tensor
    """[N + 1] int32."""
    key_limits: Tensor
    """[N + 1] int32."""
    longest: int
    longest_keys: int

    @classmethod
    def of(
        cls, lengths: Sequence[int], key_lengths: Sequence[int], device: torch.device, place: Place = plainly
    ) -> Places:
        """From the number of queries and of keys of each sequence."""
        ends = [list(accumulate(numbers, initial=0)) for numbers in (lengths, key_lengths)]
        limits, key_limits = place(ends, device, torch.int32)
        return cls(limits, key_limits, max(lengths), max(key_lengths))


@cache
def is_available() -> bool:
    """Whether this release of torch has the kernel with all that is asked of it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"scale", "window_size"} <= inspect.signature(varlen_attn).parameters.keys()


def flash(query: Tensor, key: Tensor, value: Tensor, places: Places, scale: float | None, window: int | None) -> Tensor:
    """[T, Hq, D] causal attention of each sequence.

    Args:
        query: [T, Hq, D]; in another precision than values, as autocast leaves it, it is cast.
        key: [L, Hkv, D], likewise.
        value: [L, Hkv, D] in half precision.
        places: where sequences end.
        scale: of the products of queries and keys; None = 1 / sqrt(D).
        window: tokens that a token looks back at, itself included; None = all before it.
    """
    from torch.nn.attention.varlen import varlen_attn

    query, key = query.to(value.dtype), key.to(value.dtype)
    if (repeats := query.shape[1] // key.shape[1]) > 1:  # not all releases with the kernel take grouped heads
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    looks_back = -1 if window is None else window - 1
    output = varlen_attn(query, key, value, *places, scale=scale, window_size=(looks_back, 0))
    assert isinstance(output, Tensor), "nothing besides was asked for"
    return output
