"""From logits to log-probs. Half precision is always widened: its rounding is larger than what a loss compares."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What log-probs and sums are computed in: float64 where `dtype` is, else float32."""
    return torch.promote_types(dtype, torch.float32)


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probs of [.., V] logits at a temperature, in `wide_dtype`."""
    logits = logits.to(wide_dtype(logits.dtype))
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


def floored_log_softmax(logits: Tensor) -> Tensor:
    """Log-probs that are never -inf: 0 * log 0 has to be 0. At this floor a probability is 0 in any float.

    Args:
        logits: [Q, V] in any float dtype.

    Returns:
        [Q, V] in `wide_dtype`.
    """
    floor = torch.finfo(logits.dtype).min / 2
    logits = logits.to(wide_dtype(logits.dtype))
    return logits.clamp(min=torch.finfo(logits.dtype).min).log_softmax(-1).clamp(min=floor)


def entropy(logprobs: Tensor) -> Tensor:
    """[Q] nats from log-probs [Q, V]; a token of probability 0 adds nothing."""
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)


def at_tokens(logprobs: Tensor, tokens: Tensor) -> Tensor:
    """[R] log-prob of one token per row.

    Args:
        logprobs: [R, V].
        tokens: [R].
    """
    return logprobs.gather(1, tokens[:, None])[:, 0]
