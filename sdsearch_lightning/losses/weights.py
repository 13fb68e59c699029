"""Weights that turn losses per token into one number.

Invariant: every normaliser lives in a weight, computed once per optimizer step from counts over the whole step (all
micro-batches, all ranks). A loss is then a plain weighted sum; nothing averages on its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.losses.logprobs import wide_dtype
from sdsearch_lightning.types import Label, SpanKind

AggregationMode = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
GroupsRule = Literal["all", "any_correct", "mixed", "sqrt"]


class StepTotals(NamedTuple):
    """Counts over one whole optimizer step: all micro-batches of all ranks."""

    rows: int
    """Rollouts, empty ones included."""
    tokens: int
    """Counted tokens."""


def token_weights(
    mask: Tensor,
    mode: AggregationMode,
    norm: float | None = None,
    *,
    totals: StepTotals | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Weight of each token, so that a loss is `(values * weights).sum()`.

        token-mean                mask / tokens
        seq-mean-token-mean       mask / tokens of the row / rows
        seq-mean-token-sum-norm   mask / norm / rows

    Without `totals` the mask is the whole step. With them it is any share of the step that holds whole rows: every rank
    counts its own, the counts are summed over ranks once, and the weights of all shares are those of the joint mask.

    Args:
        mask: [N, T] bool, True = counted. An empty row is a row: it counts as 0 in both seq-means.
        mode: one of the three above.
        norm: seq-mean-token-sum-norm only; T unless given, and required with `totals` (T of a share is an accident).
        totals: counts over the whole step, where `mask` is only a part of it.
        dtype: of the weights; a mask has no float dtype to keep.

    Returns:
        [N, T], 0 where not counted; all 0 for an empty mask.

    Raises:
        ConfigError: unknown `mode`; `norm` not above 0, or missing beside `totals`.
    """
    if mode not in get_args(AggregationMode):
        raise ConfigError(f"Unknown aggregation mode {mode!r}: expected one of {', '.join(get_args(AggregationMode))}.")
    counted = mask.to(dtype)
    rows, tokens = totals or StepTotals(mask.shape[0], int(mask.sum()))
    if mode == "token-mean":
        return counted / max(tokens, 1)
    if mode == "seq-mean-token-mean":
        return counted / counted.sum(dim=1, keepdim=True).clamp(min=1) / max(rows, 1)
    if norm is None and totals is not None:
        raise ConfigError("seq-mean-token-sum-norm over several ranks needs norm: the width of a mask differs by rank.")
    if norm is not None and norm <= 0:
        raise ConfigError(f"Expected norm above 0, got {norm}. It is the length that a row sum is divided by.")
    return counted / (norm or max(mask.shape[1], 1)) / max(rows, 1)


def aggregate(values: Tensor, mask: Tensor, mode: AggregationMode, norm: float | None = None) -> Tensor:
    """One loss from per-token values: `(values * token_weights(mask, mode, norm)).sum()`.

    Args:
        values: [N, T]; what stands at uncounted positions does not matter, be it NaN.
        mask: [N, T] bool, True = counted.
        mode: see `token_weights`.
        norm: see `token_weights`.

    Returns:
        Scalar in the dtype of `values`; 0 for an empty mask.
    """
    assert values.shape == mask.shape, f"one mask entry per value, got {tuple(mask.shape)} for {tuple(values.shape)}"
    weights = token_weights(mask, mode, norm, dtype=wide_dtype(values.dtype))
    return (values.masked_fill(mask.logical_not(), 0) * weights).sum().to(values.dtype)


def query_weights(num_query_tokens: Tensor, group_weights: Tensor, num_trajectories: int | None = None) -> Tensor:
    """JSD weight of each query token of a trajectory.

        group_weight / |Q_tau| / number of trajectories with queries in the whole step

    The denominator counts every trajectory that has queries, taught or not: a rule that drops groups then lowers the
    loss, instead of raising the weight of those that stay.

    Args:
        num_query_tokens: [N] |Q_tau|; 0 for a trajectory without queries.
        group_weights: [N] `group_weight` of the trajectory's group; 0 where nothing is taught.
        num_trajectories: the denominator, where these N are only a share of the step (summed over ranks).

    Returns:
        [N] in the dtype of `group_weights`: what each of the trajectory's query tokens weighs; 0 without queries.
    """
    has_queries = num_query_tokens > 0
    if num_trajectories is None:
        num_trajectories = int(has_queries.sum())
    return group_weights * has_queries / num_query_tokens.clamp(min=1) / max(num_trajectories, 1)


def group_weight(labels: Sequence[Label | None], rule: GroupsRule = "all") -> float:
    """How much the JSD loss of a group counts, from the share p of its rollouts that are CORRECT.

        all           1
        any_correct   1 if p > 0, else 0
        mixed         1 if 0 < p < 1, else 0
        sqrt          2 * sqrt(p * (1 - p)): 1 at p = 1/2, 0 for a group without contrast

    Args:
        labels: hindsight labels of the group; None (a rollout that must not be judged) is left out.
        rule: one of the four above.

    Returns:
        In [0, 1].

    Raises:
        ConfigError: unknown `rule`.
    """
    known = [label for label in labels if label is not None]
    correct = sum(label is Label.CORRECT for label in known) / max(len(known), 1)
    match rule:
        case "all":
            return 1.0
        case "any_correct":
            return float(correct > 0)
        case "mixed":
            return float(0 < correct < 1)
        case "sqrt":
            return 2 * math.sqrt(correct * (1 - correct))
    raise ConfigError(f"Unknown groups rule {rule!r}: expected one of {', '.join(get_args(GroupsRule))}.")


# By kind of token


@dataclass(frozen=True)  # as its subclasses are, or jsonargparse would ask for a class_path
class _ByKind:
    """Fields of a dataclass that are named as span kinds are, in lower case."""

    def by_kind(self) -> Mapping[SpanKind, float]:
        """The numbers by span kind; 0 for a kind without a field."""
        return {kind: float(getattr(self, kind.lower(), 0.0)) for kind in SpanKind}


@dataclass(frozen=True)
class EntropyCoefs(_ByKind):
    """Weight of the policy's entropy at each kind of token: above 0 a bonus, below 0 a penalty (sharpening)."""

    reasoning: float = 0.0
    """Weight at thoughts, and at whatever else the policy writes outside of the tags below; above 0 a bonus."""
    query: float = 0.0
    """Weight at the tokens of executed queries; above 0 a bonus."""
    refine: float = 0.0
    """Weight at the tokens of refined notes; above 0 a bonus."""
    answer: float = 0.0
    """Weight at the tokens of the answer; above 0 a bonus."""
    scaffold: float = 0.0
    """Weight at the tokens of tags; above 0 a bonus."""

    def __post_init__(self) -> None:
        if not all(math.isfinite(value) for value in self.by_kind().values()):
            raise ConfigError(f"model.entropy_coef: expected finite numbers, found {self}.")

    @property
    def is_zero(self) -> bool:
        """Whether there is no entropy term at all; then none is computed."""
        return not any(self.by_kind().values())


@dataclass(frozen=True)
class LossWeights(_ByKind):
    """Weight of each kind of token in the cold start's loss; a prompt weighs nothing."""

    reasoning: float = 1.0
    """Weight of the tokens of thoughts."""
    query: float = 1.0
    """Weight of the tokens of search queries."""
    refine: float = 1.0
    """Weight of the tokens of refined notes."""
    answer: float = 1.0
    """Weight of the tokens of the answer."""
    scaffold: float = 1.0
    """Weight of the tokens of tags."""
    observation: float = 0.0
    """Weight of the tokens of documents. Above 0, the policy learns to write documents itself, and tags in queries."""

    def __post_init__(self) -> None:
        weights = self.by_kind().values()
        if min(weights) < 0 or sum(weights) == 0:
            raise ConfigError(f"model.loss_weights: expected none below 0 and one above 0, found {self}.")
