"""Drawing tokens so that rounding seldom decides: the Gumbel-max trick on numbers of the rollout's own.

    token = argmax_v ( log p(v) - log E(v) ),   E(v) = -log U(v) exponential                       (arXiv:1611.01144)

U(v) is a hash of the rollout's key, the position of the draw, and v. So a rollout's tokens depend on nothing but its
seed and the logits it sees, on any device and in any batch; and where two engines round logits differently, a token
changes only where the two best scores are as close as that. (Inverting the cumulative distribution would add up all
rounding errors before the token: with 49 152 tokens one rollout in five came out another.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from sdsearch_lightning.losses.logprobs import at_tokens, wide_dtype
from sdsearch_lightning.policy.placing import Place, plainly
from sdsearch_lightning.types import Sampling

_GOLDEN, _MIX1, _MIX2 = (value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""Of splitmix64 (Steele, Lea and Flood, 2014), as signed integers, whose products wrap around."""


_CACHE = 2**17
"""Numbers that are made at a time on a CPU; more would not stay in its cache."""


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts: equal parts, equal seed, on any machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Draws:
    """The random numbers of one rollout: a key that counts."""

    def __init__(self, seed: int) -> None:
        self._seed, self._count = seed, 0

    def next_key(self) -> int:
        """Of the next token; greedy or not, so that both consume alike."""
        self._count += 1
        return derive_seed(self._seed, self._count)

    def take_back(self) -> None:
        """The last key is the next one again: its token was one too many."""
        self._count -= 1


def sample(
    logits: Tensor, sampling: Sequence[Sampling], draws: Sequence[Draws], place: Place = plainly
) -> tuple[Tensor, Tensor]:
    """Draw one token per row.

    Args:
        logits: [A, V].
        sampling: one per row; temperature 0 takes the most probable token.
        draws: one per row; each gives up one key.
        place: how temperatures and keys get to the device.

    Returns:
        token ids [A] and their log-probs [A] at the row's temperature (1 for greedy), before any top-p cut: what a
        forward pass of the trainer gives for the same token.
    """
    logits, device = logits.to(wide_dtype(logits.dtype)), logits.device
    temperature = place([s.temperature or 1.0 for s in sampling], device, logits.dtype)
    logprobs = (logits / temperature[:, None]).log_softmax(-1)
    keys = place([draw.next_key() for draw in draws], device, torch.long)
    scores, drawn = logprobs, [i for i, s in enumerate(sampling) if s.temperature > 0]
    if drawn:
        rows = place(drawn, device, torch.long)
        kept = logprobs[rows]
        if any(sampling[i].top_p < 1 for i in drawn):
            kept = _nucleus(kept, place([sampling[i].top_p for i in drawn], device, torch.float32))
        scores = logprobs.index_put((rows,), kept - exponentials(keys[rows], logits.shape[-1]).log().to(kept.dtype))
    tokens = scores.argmax(-1)
    return tokens, at_tokens(logprobs, tokens)


def exponentials(keys: Tensor, num_tokens: int) -> Tensor:
    """[A, V] exponential numbers of mean 1, each a function of its row's key [A] and its column; float32.

    Small ones, which decide, keep their digits: they come of -log(1 - u) with u a multiple of 2^-32.
    """
    steps = torch.arange(1, num_tokens + 1, device=keys.device) * _GOLDEN
    size = len(keys) if keys.device.type != "cpu" else max(1, _CACHE // num_tokens)
    bits = torch.cat([_mixed(some[:, None] + steps) for some in keys.split(max(size, 1))])
    return bits.add_(0.5).mul_(-(2.0**-32)).log1p_().neg_()


def _mixed(x: Tensor) -> Tensor:
    """The upper 32 bits of splitmix64's output, as floats; `x` is used up."""
    x.bitwise_xor_(_shifted(x, 30)).mul_(_MIX1)
    x.bitwise_xor_(_shifted(x, 27)).mul_(_MIX2)
    return _shifted(x.bitwise_xor_(_shifted(x, 31)), 32).float()


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _nucleus(logprobs: Tensor, top_p: Tensor) -> Tensor:
    """-inf outside the smallest set of tokens whose mass reaches `top_p`; [A, V], [A] -> [A, V]."""
    ordered, order = logprobs.sort(-1, descending=True)
    probs = ordered.exp()
    before = probs.cumsum(-1) - probs
    return torch.full_like(logprobs, -torch.inf).scatter(
        -1, order, ordered.masked_fill(before >= top_p[:, None], -torch.inf)
    )
