"""Rewards and outcome labels: what a finished rollout is worth, from its answer alone.

Invariant: scoring reads `Trajectory.answer` (and `.refinements`), which the rollout cut from the policy's own tokens.
No prompt, passage or raw text is parsed here, so an `<answer>` in an example or a passage can never be scored.
The string rules are SQuAD's as Search-R1 and AutoRefine use them, so that scores compare: ASCII punctuation is deleted
(not spaced), accents are kept. One difference: an answer that is empty never scores, not even where a gold answer, as
"A" or "!", normalises to nothing. A question may ask for another rule (`Question.normalization`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.scoring.normalization import normalize_answer as normalize_answer
from sdsearch_lightning.types import Label, Pluggable, Trajectory

_VERDICTS = {"yes", "no", "noanswer"}


def exact_match(prediction: str | None, answers: Iterable[str], rule: str = "english") -> float:
    """1.0 if the normalised prediction equals any normalised gold answer, else 0.0; no answer and "" score 0.0."""
    if prediction is None or not prediction.strip():
        return 0.0
    return float(normalize_answer(prediction, rule) in _normalized(answers, rule))


def substring_match(prediction: str | None, answers: Iterable[str], rule: str = "english") -> float:
    """1.0 if any normalised gold answer is part of the normalised prediction, else 0.0 ("cover EM")."""
    if prediction is None or not prediction.strip():
        return 0.0
    normalized = normalize_answer(prediction, rule)
    return float(any(gold in normalized for gold in _normalized(answers, rule)))


def f1(prediction: str | None, answers: Iterable[str], rule: str = "english") -> float:
    """Token F1 of the normalised strings, the best over gold answers, in [0, 1].

    "yes", "no" and "noanswer" only count whole: where one side is such a verdict, the other must equal it. An empty
    prediction or gold answer has no tokens and scores 0, even against another empty one.
    """
    if prediction is None:
        return 0.0
    normalized = normalize_answer(prediction, rule)
    return max((_f1_one(normalized, gold) for gold in _normalized(answers, rule)), default=0.0)


def _f1_one(prediction: str, gold: str) -> float:
    if prediction != gold and not _VERDICTS.isdisjoint((prediction, gold)):
        return 0.0
    prediction_tokens, gold_tokens = prediction.split(), gold.split()
    num_shared = sum((Counter(prediction_tokens) & Counter(gold_tokens)).values())
    return 2 * num_shared / max(len(prediction_tokens) + len(gold_tokens), 1)


def holds_gold(answers: Iterable[str], texts: Iterable[str], rule: str = "english") -> bool:
    """Whether any text holds a gold answer, by the words of both."""
    golds = [f" {gold} " for gold in _normalized(answers, rule) if gold]
    return any(gold in f" {normalize_answer(text, rule)} " for text in texts for gold in golds)


def _normalized(answers: Iterable[str], rule: str) -> list[str]:
    golds = (answers,) if isinstance(answers, str) else answers  # a bare string would be read letter by letter
    return [normalize_answer(gold, rule) for gold in golds]


class Reward(Pluggable):
    """Base of rewards: a number per finished rollout. Any class with a `score` method is accepted in its place."""

    required = ("score",)

    @abstractmethod
    def score(self, trajectory: Trajectory) -> float | None:
        """Reward of one rollout, a finite number; None for no verdict: it then has no part in its group's baseline."""


class ExactMatchReward(Reward):
    """Exact match of the answer (Search-R1)."""

    def score(self, trajectory: Trajectory) -> float:
        """1.0 where the answer matches a gold answer exactly, else 0.0."""
        return exact_match(trajectory.answer, trajectory.question.answers, trajectory.question.normalization)


class F1Reward(Reward):
    """Token F1 of the answer."""

    def score(self, trajectory: Trajectory) -> float:
        """Token F1 of the answer against the closest gold answer, in [0, 1]."""
        return f1(trajectory.answer, trajectory.question.answers, trajectory.question.normalization)


class SearchR1FormatReward(Reward):
    """Exact match and form together (Search-R1 v0.3, whose scripts have these defaults).

    The form is valid where the rollout ended with an answer, and each of its turns is one thought and one action in
    their tags, with nothing around them.

    Args:
        structure_format_score: what a valid form is worth: in place of 0 where the answer is wrong, and taken from a
            right answer where the form is not valid.
        final_format_score: reward of a wrong answer where the form is not valid.
        retrieval_score: more for a wrong answer in valid form where a passage holds a gold answer.
    """

    def __init__(
        self, structure_format_score: float = 0.2, final_format_score: float = 0.1, retrieval_score: float = 0.0
    ) -> None:
        self.structure_format_score, self.final_format_score = structure_format_score, final_format_score
        self.retrieval_score = retrieval_score

    def score(self, trajectory: Trajectory) -> float:
        """1 for a right answer in valid form, less for what lacks one or both; 0 without an answer."""
        if trajectory.answer is None:
            return 0.0  # a form without an answer is never valid
        golds, rule = trajectory.question.answers, trajectory.question.normalization
        is_valid = all(fault.startswith("missing") for fault in trajectory.format_faults)
        if exact_match(trajectory.answer, golds, rule):
            return 1.0 if is_valid else 1.0 - self.structure_format_score
        if not is_valid:
            return self.final_format_score
        texts = (" ".join(passage.contents for passage in found) for found in trajectory.passages)
        has_gold = any(substring_match(text, golds, rule) for text in texts)
        return self.structure_format_score + self.retrieval_score * has_gold


class AutoRefineReward(Reward):
    """AutoRefine's: token F1 of the answer; a wrong one still earns a little if the refined notes hold a gold answer.

    Args:
        refine_score: reward of a rollout whose answer has F1 0 and whose `<refine>` text contains a gold answer.
        format_score: more where its F1 is 0 and each of its tags occurs, opened as often as closed.
    """

    def __init__(self, refine_score: float = 0.1, format_score: float = 0.0) -> None:
        self.refine_score, self.format_score = refine_score, format_score

    def score(self, trajectory: Trajectory) -> float:
        """F1 where it is positive, else what notes and form are worth; without an answer 0."""
        golds, rule = trajectory.question.answers, trajectory.question.normalization
        value = f1(trajectory.answer, golds, rule)
        if value > 0 or trajectory.answer is None:
            return value
        has_form = all(fault == "loose" for fault in trajectory.format_faults)
        notes = " ".join(trajectory.refinements)
        return self.format_score * has_form + self.refine_score * substring_match(notes, golds, rule)


class LabelRule(Pluggable):
    """Base of label rules: what the hindsight block tells of a rollout's outcome, whatever the reward is."""

    required = ("label",)

    @abstractmethod
    def label(self, trajectory: Trajectory) -> Label:
        """CORRECT or INCORRECT; a rollout without a valid answer is INCORRECT."""


class F1LabelRule(LabelRule):
    """CORRECT where the token F1 of the answer is above `rho` (the paper's rule, with rho = 0: any overlap).

    Args:
        rho: threshold in [0, 1); the F1 has to be strictly above it.
    """

    def __init__(self, rho: float = 0.0) -> None:
        if not 0.0 <= rho < 1.0:
            raise ConfigError(f"F1LabelRule: expected 0 <= rho < 1, got {rho}. At 1 no rollout could be CORRECT.")
        self.rho = rho

    def label(self, trajectory: Trajectory) -> Label:
        """CORRECT where the F1 of the answer is above `rho`, else INCORRECT."""
        asked = trajectory.question
        return _label(f1(trajectory.answer, asked.answers, asked.normalization) > self.rho)


class ExactMatchLabelRule(LabelRule):
    """CORRECT where the answer matches exactly."""

    def label(self, trajectory: Trajectory) -> Label:
        """CORRECT where the answer matches a gold answer exactly, else INCORRECT."""
        asked = trajectory.question
        return _label(exact_match(trajectory.answer, asked.answers, asked.normalization) > 0)


def _label(correct: bool) -> Label:
    return Label.CORRECT if correct else Label.INCORRECT
