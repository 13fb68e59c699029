"""Does the engine sample from the policy that is trained? It is tried before the first rollouts, whatever they are.

An engine that decodes with holes in its cache, a window that counts cells, a recurrent layer that eats padding, weights
that did not arrive: each makes rollouts of another policy, and a ratio of 1 by construction hides it. So a few short
rollouts are run whose ends and searches come by count, whatever their tokens say: some go on while others wait, and all
grow beyond the model's window where a run can. What the engine recorded has to be what a training pass gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdsearch_lightning.errors import ConfigError, RetrievalError, RolloutError
from sdsearch_lightning.losses.logprobs import at_tokens, log_softmax
from sdsearch_lightning.policy.packing import PackedSequences
from sdsearch_lightning.policy.policy import Policy
from sdsearch_lightning.protocol.conversation import Continue, Search, Stop
from sdsearch_lightning.rollout.engine import Engine, StartConversation, run_awake
from sdsearch_lightning.types import (
    Passage,
    Question,
    RolloutRequest,
    Span,
    SpanKind,
    StopReason,
    Trajectory,
)

PLANS = ((6, 3), (2, 14, 6), (24,), (6, 2))
"""Tokens of the turns of each rollout: some wait while others go on. Two and two begin alike."""
LONGEST_PLAN = max(map(sum, PLANS)) + 2
PROMPT, FEW = 6, 24
"""Tokens of a prompt, and of an observation where there is no window to get beyond."""
EXACT, HALF = 1e-3, 0.06
"""Mean difference of log-probs in nats that is rounding: of float32, of half precision. Wrong engines have .1 to 10.

Two passes in bfloat16 differ by .02, and by .03 where logits are bfloat16 too: from 16 to 32, where most of a
pretrained model's likely tokens have them, its numbers are an eighth apart. Of larger ones see `_rounding`."""
_BREAKS = (RuntimeError, LookupError, TypeError, AttributeError, ValueError)
"""What a model's own code raises where an engine asks it for something that it cannot do."""


class Gap(NamedTuple):
    """How far an engine's log-probs are from those of a training pass, in nats per token."""

    mean: float
    most: float
    rounding: float = EXACT
    """What the mean may be, by what the training pass computed in."""


@dataclass
class _Scripted:
    """Takes a conversation's place: searches after `turns[0]` tokens, reads, samples `turns[1]` more, and so on."""

    request: RolloutRequest
    turns: tuple[int, ...]
    observation: tuple[int, ...]
    max_tokens: int
    stop_reason: StopReason | None = None

    def __post_init__(self) -> None:
        self._spans = [Span(SpanKind.PROMPT, self.request.prompt_ids)]
        self._turn: list[tuple[int, float]] = []
        self._left = list(self.turns)

    @property
    def turn_budget(self) -> int:
        """Tokens that the turn still takes."""
        return self._left[0] - len(self._turn)

    def accept(self, token_id: int, logprob: float) -> Continue | Search | Stop:
        """Take a sampled token; see `Conversation.accept`."""
        self._turn.append((token_id, logprob))
        if self.turn_budget:
            return Continue()
        ids, logprobs = zip(*self._turn, strict=True)
        self._spans.append(Span(SpanKind.REASONING, ids, logprobs, sampled=True))
        self._turn = []
        self._left.pop(0)
        if self._left:
            return Search("probe")
        self.stop_reason = StopReason.ANSWERED
        return Stop(self.stop_reason)

    def observe(self, result: Sequence[Passage] | RetrievalError) -> tuple[int, ...]:
        """The same tokens, whatever was found; after a second search two of them."""
        first = not any(span.kind is SpanKind.OBSERVATION for span in self._spans)
        token_ids = self.observation if first else self.observation[:2]
        self._spans.append(Span(SpanKind.OBSERVATION, token_ids))
        return token_ids

    def finish(self) -> Trajectory:
        """What was sampled, and with which log-probs."""
        request, reason = self.request, self.stop_reason or StopReason.MAX_TOKENS
        return Trajectory(request.question, request.instance_id, request.rollout_index, tuple(self._spans), reason)


class _NoSearches:
    """A search pool that finds nothing, at once."""

    def submit(self, queries: Sequence[str]) -> Future[list[Any]]:
        answers: Future[list[Any]] = Future()
        answers.set_result([() for _ in queries])
        return answers


def observation_length(policy: Policy, max_tokens: int) -> int:
    """Tokens of what a probe's searches return: beyond the model's window where rollouts get there, else a few."""
    room = max_tokens - PROMPT - LONGEST_PLAN
    return max(2, min(policy.window_to_try or FEW, room))


def probe_requests(
    policy: Policy, text_ids: Sequence[int], max_tokens: int, copies: int = 1
) -> tuple[list[RolloutRequest], StartConversation, Any]:
    """The probe's requests, their conversations and a search pool, as an engine takes them.

    Args:
        policy: has the window.
        text_ids: at least one token of ordinary text, repeated as often as it takes.
        max_tokens: of a rollout in the run.
        copies: of each plan, with other seeds and prompts.
    """
    length, question = observation_length(policy, max_tokens), Question("probe", "", ("",))
    text = tuple(text_ids[i % len(text_ids)] for i in range(length + PROMPT + 2 * copies))
    plans = PLANS * copies
    requests = [
        RolloutRequest(question, (0, i // 2), i % 2, text[i // 2 : i // 2 + PROMPT - 1], seed=i)
        for i in range(len(plans))
    ]

    def start(request: RolloutRequest) -> Any:
        turns = plans[2 * request.instance_id[1] + request.rollout_index]
        return _Scripted(request, turns, text[:length], PROMPT + length + LONGEST_PLAN)

    return requests, start, _NoSearches()


def measure_gap(engine: Engine, policy: Policy, text_ids: Sequence[int], max_tokens: int) -> Gap:
    """Run the probe on an engine and compare; the caller has set eval mode, precision and whole weights.

    Args:
        engine: any; it is attached to the probe, and has to be attached again afterwards.
        policy: what it should sample from.
        text_ids: at least one token of ordinary text, repeated as often as it takes.
        max_tokens: of a rollout in the run.

    Raises:
        RolloutError: whatever the engine, or the model under it, raised.
    """
    requests, start, searches = probe_requests(policy, text_ids, max_tokens)
    engine.attach(policy, start, searches)
    try:
        return _compare(policy, run_awake(engine, policy, requests))
    except ConfigError:
        raise  # an option that cannot be used: it is told as it is
    except _BREAKS as error:
        raise RolloutError(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error


@torch.no_grad()
def _compare(policy: Policy, played: Sequence[Trajectory]) -> Gap:
    """Recorded log-probs against those of one training pass over all rollouts."""
    device = next(policy.parameters()).device
    sequences = PackedSequences.pack([t.token_ids for t in played], device)
    sampled = torch.tensor([mask for t in played for mask in t.policy_mask], device=device).nonzero()[:, 0]
    logits = policy.logits(sequences, sampled)
    logprobs = log_softmax(logits)
    mine = at_tokens(logprobs, sequences.token_ids[sampled]).double().cpu()
    recorded = torch.tensor([x for t in played for s in t.spans for x in s.logprobs or ()], dtype=torch.float64)
    gaps = (mine - recorded).abs()
    return Gap(float(gaps.mean()), float(gaps.max()), _rounding(logits))


def _rounding(logits: Tensor) -> float:
    """The mean gap that is rounding where a training pass gave these logits [R, V]."""
    is_half = logits.dtype.itemsize < 4 or torch.is_autocast_enabled(logits.device.type)
    if not is_half:
        return EXACT
    largest = max(float(logits.abs().amax(-1).mean()), 1.0)
    spacing = torch.finfo(logits.dtype).eps * 2.0 ** math.floor(math.log2(largest))
    return max(HALF, spacing / 2)


def find_exact(engine: Engine, policy: Policy, text_ids: Sequence[int], max_tokens: int) -> tuple[Gap, list[str]]:
    """Have `engine` step back until it samples from the policy.

    Args:
        engine: see `measure_gap`; one that computes in half precision by itself says so by `is_exact`.
        policy: what it should sample from.
        text_ids: see `measure_gap`.
        max_tokens: of a rollout in the run.

    Returns:
        The gap that is left, and why each way before it did not do.

    Raises:
        ConfigError: none does.
    """
    reasons: list[str] = []
    while True:
        try:
            gap = measure_gap(engine, policy, text_ids, max_tokens)
            if gap.mean <= (gap.rounding if engine.is_exact else max(gap.rounding, HALF)):
                return gap, reasons
            reasons.append(f"log-probs differ from a training pass by {gap.mean:.2g} nats ({gap.most:.2g} at most)")
        except RolloutError as error:
            reasons.append(str(error).splitlines()[0])
        if not engine.step_back():
            raise ConfigError(
                f"rollout.engine: {type(engine).__name__} does not sample from the policy that is trained, for models "
                f"of type {policy.model.config.model_type!r}: {reasons[-1]}. Use another model, or another engine."
            )
