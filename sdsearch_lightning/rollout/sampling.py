"""Drawing tokens: one uniform number per token, by inversion of the cumulative distribution.

A rollout's numbers come from its own seeded generator, so that its tokens depend on nothing but its seed and the
logits it sees.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from sdsearch_lightning.losses.logprobs import at_tokens, wide_dtype
from sdsearch_lightning.types import Sampling


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts: equal parts, equal seed, on any machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def sample(logits: Tensor, sampling: Sequence[Sampling], generators: Sequence[random.Random]) -> tuple[Tensor, Tensor]:
    """Draw one token per row.

    Args:
        logits: [A, V].
        sampling: one per row; temperature 0 takes the most probable token.
        generators: one per row; each gives up one number, greedy or not, so that both consume alike.

    Returns:
        token ids [A] and their log-probs [A] at the row's temperature (1 for greedy), before any top-p cut: what a
        forward pass of the trainer gives for the same token.
    """
    logits = logits.to(wide_dtype(logits.dtype))
    temperature = torch.tensor([s.temperature or 1.0 for s in sampling], dtype=logits.dtype, device=logits.device)
    logprobs = (logits / temperature[:, None]).log_softmax(-1)
    tokens = logprobs.argmax(-1)
    uniforms = torch.tensor([g.random() for g in generators], dtype=torch.float64, device=logits.device)
    drawn = torch.tensor([s.temperature > 0 for s in sampling], device=logits.device)
    if bool(drawn.any()):
        probs = logprobs.double().exp()
        if any(s.top_p < 1 for s in sampling):
            probs = _nucleus(probs, torch.tensor([s.top_p for s in sampling], device=logits.device))
        cumulative = probs.cumsum(-1)
        # right=True never stops at a token of probability 0; the product stays below the last entry.
        picked = torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True)[:, 0]
        tokens = torch.where(drawn, picked.clamp(max=logits.shape[-1] - 1), tokens)
    return tokens, at_tokens(logprobs, tokens)


def _nucleus(probs: Tensor, top_p: Tensor) -> Tensor:
    """Zero everything outside the smallest set of tokens whose mass reaches `top_p`; [A, V], [A] -> [A, V]."""
    ordered, order = probs.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(probs).scatter(-1, order, ordered * (before < top_p[:, None]))
