"""Attention over tokens that lie back to back: the one function that stock models call, and who may look at whom.

A stock transformers model asks a registry for its attention function. Here one is registered that asks a *layout*: an
object that is handed to the model's forward pass and reaches every layer with its queries, keys and values. So a whole
batch is one row of tokens without padding, and no mask of all tokens against all tokens is ever made.

    layout                            tokens of one pass                        used by
    CausalSegments                    sequences, or a prefix and its suffixes   training (packing.py)
    rollout.kv_rows.RowsAttention     new tokens of rollouts with a KV row      the slot engine

What a layer asks for beyond softmax(QK)V comes along in its `Call`: a window, a soft cap on the logits, sinks, values
of another width than keys. What is not known is refused. Invariant: a layout sees one pass; nothing of it stays in the
model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from sdsearch_lightning.errors import SDSearchError
from sdsearch_lightning.losses.logprobs import wide_dtype
from sdsearch_lightning.policy.flash import MAX_WIDTH, Places, flash, is_available

NAME = "sdsearch_layout"
_UNKNOWN = ("position_bias", "indexer", "topk_indices")
"""Arguments by which a model asks for more than `Call` tells; a layout would leave them out without a word."""


_HALF = torch.bfloat16, torch.float16


class UnknownAttentionError(SDSearchError):
    """A model's attention does more than a layout does; `Policy.unpackable` makes a reason of it."""


class Call(NamedTuple):
    """What one layer asks of a layout. Positions are already applied to queries and keys."""

    layer: int
    query: Tensor
    """[1, Hq, T, D]."""
    key: Tensor
    """[1, Hkv, T, D]."""
    value: Tensor
    """[1, Hkv, T, E]; E is D in most models."""
    scale: float | None = None
    """Of the products of queries and keys; None = 1 / sqrt(D)."""
    window: int | None = None
    """Tokens that a token looks back at, itself included; None = all before it."""
    softcap: float | None = None
    """Logits are cap * tanh(logits / cap) (Gemma 2)."""
    sinks: Tensor | None = None
    """[Hq] one more logit per head, which takes probability and gives no value (gpt-oss)."""

    @property
    def fits_flash(self) -> bool:
        """Whether policy/flash.py computes it."""
        width, value = self.query.shape[3], self.value
        is_plain = self.softcap is None and self.sinks is None and width == value.shape[3] and width <= MAX_WIDTH
        return is_plain and value.is_cuda and value.dtype in _HALF and is_available()


class AttentionLayout(ABC):
    """Computes the attention of one forward pass, layer by layer."""

    @abstractmethod
    def attend(self, call: Call) -> Tensor:
        """[1, Hq, T, E] what each token makes of those that it may look at."""


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
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    if asked := [name for name in _UNKNOWN if options.get(name) is not None]:
        raise UnknownAttentionError(f"its attention uses {', '.join(asked)}")
    layer: int = module.layer_idx  # type: ignore[assignment]
    call = Call(layer, query, key, value, scaling, sliding_window, softcap, s_aux)
    return attention_layout.attend(call).transpose(1, 2), None


AttentionInterface.register(NAME, _attend)


class Segment(NamedTuple):
    """A run of tokens that attend to themselves, causally, and to all of an earlier segment."""

    length: int
    prefix: int | None = None
    """Index of that segment; None where there is none."""


class CausalSegments(AttentionLayout):
    """Sequences back to back, or as a tree: suffixes of a prefix that is there once.

    In half precision on CUDA one kernel takes all of them, elsewhere each is a call of its own.

    Args:
        segments: in the order of their tokens; a prefix stands before its suffixes and has none itself.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = segments
        self._lengths = [segment.length for segment in segments]
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}
        self._places: tuple[Places, Tensor | None] | None = None

    def attend(self, call: Call) -> Tensor:
        """Causal attention within each segment and its prefix; see `AttentionLayout.attend`."""
        if call.fits_flash:
            return self._fused(call)
        queries, keys, values = (x.split(self._lengths, dim=2) for x in (call.query, call.key, call.value))
        outputs = []
        for own, k, v, segment in zip(queries, keys, values, self.segments, strict=True):
            if segment.prefix is not None:
                k, v = (torch.cat([x[segment.prefix], mine], dim=2) for x, mine in ((keys, k), (values, v)))
            outputs.append(self._segment(call._replace(query=own, key=k, value=v)))
        return torch.cat(outputs, dim=2)

    def _fused(self, call: Call) -> Tensor:
        """All segments in one kernel. The keys of each stand together, so a prefix is copied to its suffixes."""
        query, key, value = (x[0].transpose(0, 1) for x in (call.query, call.key, call.value))
        places, columns = self._places or self._find_places(call.query.device)
        if columns is not None:
            key, value = key.index_select(0, columns), value.index_select(0, columns)
        return flash(query, key, value, places, call.scale, call.window).transpose(0, 1)[None]

    def _find_places(self, device: torch.device) -> tuple[Places, Tensor | None]:
        """Where segments end, and which token each key is; None where each is a key once."""
        ends = list(accumulate(self._lengths, initial=0))
        spans = [[i] if segment.prefix is None else [segment.prefix, i] for i, segment in enumerate(self.segments)]
        columns = [column for span in spans for i in span for column in range(ends[i], ends[i + 1])]
        places = Places.of(self._lengths, [sum(self._lengths[i] for i in span) for span in spans], device)
        is_tree = any(len(span) > 1 for span in spans)
        self._places = places, torch.tensor(columns, device=device) if is_tree else None
        return self._places

    def _segment(self, call: Call) -> Tensor:
        """Queries that are the last of the keys."""
        num_queries, num_keys = call.query.shape[2], call.key.shape[2]
        window = call.window if call.window is not None and call.window < num_keys else None
        if num_queries == num_keys and window is None and call.softcap is None and call.sinks is None:
            return scaled_dot_product_attention(
                call.query, call.key, call.value, is_causal=True, scale=call.scale, enable_gqa=True
            )
        shape = num_queries, num_keys, window
        if shape not in self._masks:
            self._masks[shape] = causal_mask(*shape, device=call.query.device)
        return masked_attention(call, self._masks[shape])


def causal_mask(num_queries: int, num_keys: int, window: int | None = None, *, device: torch.device) -> Tensor:
    """[num_queries, num_keys] bool: the queries are the last of the keys, and look back, at most `window` tokens."""
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)
    return seen if window is None else seen.triu(num_keys - num_queries - window + 1)


def masked_attention(call: Call, mask: Tensor) -> Tensor:
    """[B, Hq, T, E] under a bool mask that broadcasts to [B, Hq, T, L].

    Args:
        call: queries [B, Hq, T, D], keys [B, Hkv, L, D] and values [B, Hkv, L, E]; its window is in the mask already.
        mask: True where a query may look.
    """
    repeats = call.query.shape[1] // call.key.shape[1]
    key, value = call.key, call.value
    if repeats > 1:  # with a mask, grouped heads would send CUDA to its slowest kernel
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    if call.softcap is None and call.sinks is None:
        return scaled_dot_product_attention(call.query, key, value, attn_mask=mask, scale=call.scale)
    return _written_out(call._replace(key=key, value=value), mask)


def _written_out(call: Call, mask: Tensor) -> Tensor:
    """The same for what the fused kernels do not know: a soft cap, sinks."""
    logits = call.query @ call.key.transpose(-1, -2) * (call.scale or call.query.shape[-1] ** -0.5)
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    logits = logits.to(wide_dtype(logits.dtype)).masked_fill(mask.logical_not(), -torch.inf)
    if call.sinks is not None:
        sinks = call.sinks.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        return (torch.cat([logits, sinks], dim=-1).softmax(-1)[..., :-1]).to(call.value.dtype) @ call.value
    return logits.softmax(-1).to(call.value.dtype) @ call.value
