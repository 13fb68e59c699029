"""Attention over tokens that lie back to back: the one function that stock models call, and who may look at whom.

A stock transformers model asks a registry for its attention function. Here one is registered that asks a *layout*: an
object that is handed to the model's forward pass and reaches every layer with its queries, keys and values. So a whole
batch is one row of tokens without padding, and no mask of all tokens against all tokens is ever made.

    layout                            tokens of one pass                        used by
    CausalSegments                    sequences, or a prefix and its suffixes   training (packing.py)
    rollout.kv_rows.RowsAttention     new tokens of rollouts with a KV row      the slot engine

Invariant: a layout sees one pass; nothing of it stays in the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from sdsearch_lightning.errors import SDSearchError

NAME = "sdsearch_layout"
_UNKNOWN = ("sliding_window", "softcap", "s_aux", "position_bias")
"""Arguments by which a model asks for more than softmax(QK)V; a layout would leave them out without a word."""


class UnknownAttentionError(SDSearchError):
    """A model's attention does more than a layout does; `Policy.unpackable` makes a reason of it."""


class AttentionLayout(ABC):
    """Computes the attention of one forward pass, layer by layer."""

    @abstractmethod
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """[1, Hq, T, D] from query [1, Hq, T, D], key and value [1, Hkv, T, D], positions already applied."""


@contextmanager
def attention_layout(model: nn.Module, layout: AttentionLayout | None) -> Iterator[dict[str, Any]]:
    """Let `model` ask `layout` instead of its own attention; yields what its forward has to be given besides."""
    if layout is None:
        yield {}
        return
    with implementation(model, NAME):
        yield {"attention_layout": layout}


@contextmanager
def implementation(model: nn.Module, name: str) -> Iterator[None]:
    """Use the attention function registered as `name`; masks are made by its own rule, so here there are none."""
    config: Any = model.config
    before, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = before


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attention_layout: AttentionLayout,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    if asked := [name for name in _UNKNOWN if options.get(name) is not None]:
        raise UnknownAttentionError(f"its attention uses {', '.join(asked)}")
    layer: int = module.layer_idx  # type: ignore[assignment]
    return attention_layout.attend(layer, query, key, value, scaling).transpose(1, 2), None


AttentionInterface.register(NAME, _attend)


class Segment(NamedTuple):
    """A run of tokens that attend to themselves, causally, and to all of an earlier segment."""

    length: int
    prefix: int | None = None
    """Index of that segment; None where there is none."""


class CausalSegments(AttentionLayout):
    """Sequences back to back, or as a tree: suffixes of a prefix that is there once.

    Args:
        segments: in the order of their tokens; a prefix stands before its suffixes and has none itself.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = segments
        self._lengths = [segment.length for segment in segments]
        self._masks: dict[tuple[int, int], Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Causal attention within each segment, one call per segment; see `AttentionLayout.attend`."""
        queries, keys, values = (x.split(self._lengths, dim=2) for x in (query, key, value))
        outputs = []
        for own, k, v, segment in zip(queries, keys, values, self.segments, strict=True):
            if segment.prefix is None:
                outputs.append(causal_attention(own, k, v, scale))
                continue
            k, v = (torch.cat([x[segment.prefix], mine], dim=2) for x, mine in ((keys, k), (values, v)))
            shape = own.shape[2], k.shape[2]
            if shape not in self._masks:
                self._masks[shape] = causal_mask(*shape, own.device)
            outputs.append(masked_attention(own, k, v, self._masks[shape], scale))
        return torch.cat(outputs, dim=2)


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """[num_queries, num_keys] bool: the queries are the last of the keys, and look back."""
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """As many queries [B, Hq, T, D] as keys [B, Hkv, T, D], each looking back."""
    return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Queries [B, Hq, T, D] and keys [B, Hkv, L, D] under a bool mask that broadcasts to [B, Hq, T, L]."""
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:  # with a mask, grouped heads would send CUDA to its slowest kernel
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
