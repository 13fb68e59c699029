"""Numbers by kind of token: how much each kind's entropy counts in the loss, and each kind in the cold start."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.types import SpanKind


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
