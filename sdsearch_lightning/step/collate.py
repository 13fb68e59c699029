"""From rollout groups to the tensors of a loss: one optimizer step's groups in, micro-batches out.

Invariants: token ids are copied from the trajectories, never made again from text; token weights come from the counts
of the whole optimizer step on all ranks, before any split, so micro-batches and ranks cannot change a loss; a group is
never split; student and teacher hold the same tokens at paired positions.

    token           p p p  <s> q q </s>  d d d  <a> a </a>          p prompt, q query, d documents, a answer
    policy_weight   0 0 0   w  w w  w    0 0 0   w  w  w
    query_row                  x x
    teacher         p p p h h h  <s> q q                            h hindsight block; same suffix, to its last query

Next: module.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from sdsearch_lightning.losses.weights import AggregationMode, StepTotals, query_weights, token_weights
from sdsearch_lightning.policy.packing import PackedSequences, split_by_size
from sdsearch_lightning.step.taught_spans import Positions, TaughtSpans, find_taught_spans, num_distilled_tokens
from sdsearch_lightning.step.token_advantages import CreditPlacement, token_advantages
from sdsearch_lightning.types import HindsightBlock, InstanceId, Label, RolloutGroup, SpanKind, Trajectory

TeacherPrompt = Callable[[Trajectory, str], Sequence[int]]
"""Token ids of the prompt with a block text."""
SPAN_KINDS = tuple(SpanKind)
"""Codes of `SearchBatch.span_kind`."""
OUTCOMES = {Label.CORRECT: 1.0, Label.INCORRECT: -1.0, None: 0.0}
"""Codes of `SearchBatch.query_label`."""


@dataclass(frozen=True, slots=True)
class SearchBatch:
    """One micro-batch: packed rollouts with a weight per token, and the teacher's view of the taught ones."""

    sequences: PackedSequences
    """[T] token_ids, position_ids, sequence_index of the student."""
    policy_weight: Tensor
    """[T] weight of each token in the policy loss; 0 where the policy did not sample it."""
    sampled_logprobs: Tensor
    """[T] log-probs under the sampling policy."""
    advantages: Tensor
    """[T] advantage of the token's rollout, and the credit of its search where it is in one."""
    query_row: Tensor
    """[Q] index into the T tokens of each taught query token."""
    query_weight: Tensor
    """[Q] weight of each of them in the JSD loss."""
    query_label: Tensor
    """[Q] outcome of each of their rollouts: 1 CORRECT, -1 INCORRECT, 0 unknown."""
    span_kind: Tensor
    """[T] index into SPAN_KINDS."""
    taught: tuple[TaughtSpans, ...] = ()
    """Where the Q rows come from, in order."""
    teacher: PackedSequences | None = None
    """The rollouts with queries behind a hindsight block; None where nothing is taught."""
    teacher_query_row: Tensor | None = None
    """[Q] index into the teacher's tokens, paired with `query_row`."""
    contrast_row: Tensor | None = None
    """[Q] index of the same tokens behind each view's `contrast` text; None where views have none."""
    on_policy: bool = False
    """Whether the policy is still the one that sampled: the ratio is then 1 by construction."""
    old_logprobs: Tensor | None = None
    """[T] log-probs under the trainer's own policy before the first update; None where the engine's stand for them."""

    @property
    def token_ids(self) -> Tensor:
        """[T] the student's tokens."""
        return self.sequences.token_ids

    @property
    def teacher_rows(self) -> Tensor:
        """[Q] tokens that the teacher is asked about, or [2 Q], those behind the contrast last."""
        assert self.teacher_query_row is not None, "the batch has no teacher's side"
        return torch.cat([rows for rows in (self.teacher_query_row, self.contrast_row) if rows is not None])

    @property
    def position_ids(self) -> Tensor:
        """[T] 0, 1, 2, ... within each rollout."""
        return self.sequences.position_ids

    @property
    def sequence_index(self) -> Tensor:
        """[T] which rollout a token belongs to."""
        return self.sequences.sequence_index

    def to(self, device: torch.device | str) -> SearchBatch:
        """The same on `device`."""
        moved = {name: value.to(device) for name in self.__slots__ if hasattr(value := getattr(self, name), "to")}
        return replace(self, **moved)


@dataclass(frozen=True, slots=True)
class WeightedRollout:
    """A trajectory with its place in the losses of the whole optimizer step."""

    trajectory: Trajectory
    policy_weight: Tensor
    """[T]."""
    query_weight: float
    """Weight of each of its query tokens in the JSD loss; 0 where its group is not taught."""
    block: HindsightBlock | None
    old_logprobs: Tensor | None = None
    """[T] see `SearchBatch.old_logprobs`."""


def weigh(
    groups: Sequence[RolloutGroup],
    blocks: Sequence[HindsightBlock | None],
    mode: AggregationMode,
    norm: float | None = None,
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
    positions: Positions = "queries",
    dtype: torch.dtype = torch.float32,
) -> list[list[WeightedRollout]]:
    """Give every rollout of one optimizer step its weights in both losses.

    Args:
        groups: the step's groups on this rank.
        blocks: one per group; None = not taught.
        mode: aggregation of the policy loss, see `losses.token_weights`.
        norm: see there.
        sum_over_ranks: sums a tensor of counts; None for one process. Called once, on every rank.
        positions: where student and teacher are compared.
        dtype: of the policy weights.

    Returns:
        One list per group, one entry per trajectory that did not end in a retrieval error: those were not the
        policy's doing, so they are neither trained on nor counted.
    """
    judged = [[t for t in group.trajectories if not t.stop_reason.is_error] for group in groups]
    rollouts = [trajectory for group in judged for trajectory in group]
    mask = torch.zeros(len(rollouts), max((len(t.token_ids) for t in rollouts), default=1), dtype=torch.bool)
    for row, trajectory in zip(mask, rollouts, strict=True):
        row[: len(trajectory.token_ids)] = torch.tensor(trajectory.policy_mask)
    num_query_tokens = torch.tensor([num_distilled_tokens(t, positions) for t in rollouts], dtype=torch.long)
    totals = num_with_queries = None
    if sum_over_ranks is not None:
        local = torch.tensor([len(rollouts), int(mask.sum()), int((num_query_tokens > 0).sum())])
        rows, tokens, num_with_queries = sum_over_ranks(local).tolist()
        totals = StepTotals(rows, tokens)
    policy_weights = iter(token_weights(mask, mode, norm, totals=totals, dtype=dtype))
    group_weights = [block.weight if block else 0.0 for g, block in zip(judged, blocks, strict=True) for _ in g]
    query_weight = iter(
        query_weights(num_query_tokens, torch.tensor(group_weights, dtype=torch.float64), num_with_queries).tolist()
    )
    return [
        [WeightedRollout(t, next(policy_weights)[: len(t.token_ids)], next(query_weight), block) for t in group]
        for group, block in zip(judged, blocks, strict=True)
    ]


def split_groups(
    groups: Sequence[Sequence[WeightedRollout]], max_tokens: int, size: Callable[[Sequence[int]], int] = sum
) -> list[list[WeightedRollout]]:
    """Micro-batches of whole groups within a token budget, groups with the longest rollouts first.

    Args:
        groups: those without a rollout are left out; one larger than the budget gets a micro-batch of its own.
        max_tokens: the budget.
        size: tokens that the body computes for rollouts of given lengths; that of the policy's layout.
    """

    def lengths(group: Sequence[WeightedRollout]) -> list[int]:
        return [len(rollout.trajectory.token_ids) for rollout in group]

    batches = split_by_size([group for group in groups if group], lengths, max_tokens, size)
    return [[rollout for group in batch for rollout in group] for batch in batches]


def collate(
    rollouts: Sequence[WeightedRollout],
    teacher_prompt: TeacherPrompt | None = None,
    positions: Positions = "queries",
    dtype: torch.dtype = torch.float32,
    cut_teacher: bool = True,
    credit: CreditPlacement = CreditPlacement(),  # noqa: B008  (frozen)
) -> SearchBatch:
    """One micro-batch of tensors.

    Args:
        rollouts: whole groups.
        teacher_prompt: makes the prompt with the block; None leaves the teacher's side out (JSD weight 0).
        positions: where student and teacher are compared.
        dtype: of weights, log-probs and advantages.
        cut_teacher: end each of the teacher's sequences at its last judged token, and leave out those without one;
            else they are as long and as many as the student's, so that both run in equal shapes.
        credit: how the credit of a search reaches its tokens.
    """
    trajectories = [rollout.trajectory for rollout in rollouts]
    lengths = torch.tensor([len(trajectory.token_ids) for trajectory in trajectories])
    blocks = [rollout.block if teacher_prompt is not None else None for rollout in rollouts]
    taught = find_taught_spans(list(zip(trajectories, blocks, strict=True)), positions)
    offsets = [0, *lengths.cumsum(0).tolist()]
    rows = [[offsets[part.rollout] + i for i in _judged_tokens(trajectories, part)] for part in taught]
    weights = [rollouts[part.rollout].query_weight for part in taught]
    outcomes = [OUTCOMES[trajectories[part.rollout].label] for part in taught]
    judged = [row for part in rows for row in part]
    assert len(set(judged)) == len(judged), "a block's views overlap: a token would be taught twice"
    batch = SearchBatch(
        sequences=PackedSequences.pack(
            [t.token_ids for t in trajectories], prompt_lengths=[t.prompt_length for t in trajectories]
        ),
        policy_weight=torch.cat([rollout.policy_weight for rollout in rollouts]).to(dtype),
        sampled_logprobs=torch.tensor([value for t in trajectories for value in t.sampled_logprobs], dtype=dtype),
        advantages=torch.tensor([a for t in trajectories for a in token_advantages(t, credit)], dtype=dtype),
        query_row=torch.tensor(judged, dtype=torch.long),
        query_weight=torch.tensor([w for w, part in zip(weights, rows, strict=True) for _ in part], dtype=dtype),
        query_label=torch.tensor([y for y, part in zip(outcomes, rows, strict=True) for _ in part], dtype=dtype),
        span_kind=torch.tensor(
            [SPAN_KINDS.index(span.kind) for t in trajectories for span in t.spans for _ in span.token_ids]
        ),
        taught=taught,
        old_logprobs=_joined([rollout.old_logprobs for rollout in rollouts]),
    )
    if teacher_prompt is None or not len(batch.query_row):
        return batch
    return _with_teacher(batch, trajectories, offsets, rows, teacher_prompt, cut_teacher)


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    known = [part for part in parts if part is not None]
    return torch.cat(known) if len(known) == len(parts) else None


def _judged_tokens(trajectories: Sequence[Trajectory], part: TaughtSpans) -> list[int]:
    """Token indices, within its rollout, of the spans that are judged."""
    spans = trajectories[part.rollout].spans
    starts = [0, *accumulate(len(span.token_ids) for span in spans)]
    return [i for index in part.spans for i in range(starts[index], starts[index + 1])]


def _with_teacher(
    batch: SearchBatch,
    trajectories: Sequence[Trajectory],
    offsets: Sequence[int],
    rows: Sequence[Sequence[int]],
    teacher_prompt: TeacherPrompt,
    cut: bool,
) -> SearchBatch:
    """Add the teacher's side: the prompt with the block, then the very same tokens; with a contrast, all once more."""
    sequences: list[tuple[int, ...]] = []
    teacher_rows: list[int] = []
    prompts: dict[tuple[InstanceId, str], tuple[int, ...]] = {}
    prompt_lengths: list[int] = []
    base = 0
    lessons = [(part, part.block_text, judged) for part, judged in zip(batch.taught, rows, strict=True)]
    contrasts = [(part, text, judged) for part, _, judged in lessons if (text := part.contrast_text) is not None]
    assert len(contrasts) in (0, len(lessons)), "either all views of a step have a contrast, or none has"
    for part, text, judged in lessons + contrasts:
        if cut and not judged:
            continue
        trajectory, start = trajectories[part.rollout], offsets[part.rollout]
        key = trajectory.instance_id, text
        prompt = prompts.get(key) or prompts.setdefault(key, tuple(teacher_prompt(trajectory, text)))
        end = max(judged) + 1 - start if cut else None
        shift = base - start + len(prompt) - trajectory.prompt_length
        teacher_rows += [row + shift for row in judged]
        sequences.append(prompt + trajectory.token_ids[trajectory.prompt_length : end])
        prompt_lengths.append(len(prompt))
        base += len(sequences[-1])
    teacher = PackedSequences.pack(sequences, prompt_lengths=prompt_lengths)
    paired = torch.tensor(teacher_rows, dtype=torch.long).split(len(batch.query_row))
    assert all(torch.equal(teacher.token_ids[rows], batch.token_ids[batch.query_row]) for rows in paired), (
        "student and teacher must hold the same tokens at paired positions"
    )
    contrast_row = paired[1] if contrasts else None
    return replace(batch, teacher=teacher, teacher_query_row=paired[0], contrast_row=contrast_row)


def filler(dtype: torch.dtype = torch.float32) -> SearchBatch:
    """A micro-batch that weighs nothing: it keeps the number of passes equal on all ranks."""
    nothing, unsaid = torch.zeros(2, dtype=dtype), torch.zeros(0, dtype=dtype)
    none = torch.zeros(0, dtype=torch.long)
    kinds = torch.zeros(2, dtype=torch.long)
    packed = PackedSequences.pack([[0, 0]])
    return SearchBatch(packed, nothing, nothing, nothing, none, unsaid, unsaid, kinds)


def with_idle_teacher(batch: SearchBatch) -> SearchBatch:
    """The same batch; where it has no teacher's side, one that reads two tokens and judges none.

    For passes that are collectives: every micro-batch needs as many, whatever it holds.
    """
    if batch.teacher is not None:
        return batch
    return replace(batch, teacher=PackedSequences.pack([[0, 0]]), teacher_query_row=batch.query_row)
