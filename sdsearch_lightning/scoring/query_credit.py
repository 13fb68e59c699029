"""Credit per search: what one query brought, beside what its whole rollout earned.

GRPO gives all tokens of a rollout one number, so a good query in a rollout that fails in the end is punished. A
`QueryCredit` gives each executed query a number of its own; it is standardised and added to the advantage of that
query's tokens (step/token_advantages.py). Invariant: a rollout's answer and reward do not change with it, so a policy
cannot earn credit instead of answers. Those that ask the policy itself are in policy_credit.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.scoring.rewards import ExactMatchReward, Reward, holds_gold, normalize_answer
from sdsearch_lightning.types import Passage, Pluggable, Question, RolloutGroup, Trajectory

CreditScale = Literal["step", "group", "none"]
"""Over which queries credit is standardised."""
EPSILON = 1e-6


class Continuation(NamedTuple):
    """A text whose log-prob is asked for, and what the policy has read before it."""

    shared: tuple[int, ...]
    """Token ids that neighbours in a list may have in common; they are read once then."""
    own: tuple[int, ...]
    """Token ids behind them."""
    prefix: str
    """What the policy has written behind those already; not judged."""
    text: str
    """What is judged."""


class PolicyReader(ABC):
    """Gives the policy's log-probs of texts; made by rollout/policy_reader.py."""

    @abstractmethod
    def logprobs(self, asked: Sequence[Continuation]) -> list[float]:
        """Mean log-prob per token of each text, in nats."""


class QueryCredit(Pluggable):
    """Base of what a search is worth. Any class with an `assign` method is accepted in its place.

    Example:
        >>> class NewPassages(QueryCredit):
        ...     def assign(self, group):
        ...         return [[float(len(found)) for found in rollout.passages] for rollout in group.trajectories]
    """

    required, optional = ("assign",), ("read", "check_questions")

    @abstractmethod
    def assign(self, group: RolloutGroup) -> Sequence[Sequence[float]]:
        """One list per rollout of the group, with a finite number per executed query (`Trajectory.queries`).

        Args:
            group: scored, without rollouts that ended in a retrieval error.
        """

    def read(self, groups: Sequence[RolloutGroup], reader: PolicyReader) -> None:
        """Called once per step with all its groups on this rank, before `assign` is called for each of them.

        Args:
            groups: scored.
            reader: gives the policy's own log-probs of texts.
        """

    def check_questions(self, questions: Sequence[Question]) -> None:
        """Called once, before anything is rolled out.

        Args:
            questions: all that training asks.

        Raises:
            ConfigError: no credit can come of them.
        """


def assigned(credit: QueryCredit, group: RolloutGroup) -> list[tuple[float, ...]]:
    """What `credit` gives each query of a group.

    Raises:
        ConfigError: not one finite number per executed query.
    """
    values = credit.assign(group)
    name, wanted = f"rollout.credit {type(credit).__name__}.assign", [len(t.queries) for t in group.trajectories]
    try:
        found = [tuple(map(float, row)) for row in values]
    except TypeError as error:
        raise ConfigError(f"{name}: expected a list of numbers per rollout, found {values!r:.80}.") from error
    if [len(row) for row in found] != wanted:
        raise ConfigError(
            f"{name}: expected one number per executed query, {wanted} for the rollouts of question "
            f"{group.question.id!r}, found {[len(row) for row in found]}."
        )
    if any(not torch.tensor(row).isfinite().all() for row in found):
        raise ConfigError(f"{name}: expected finite numbers, found {found} for question {group.question.id!r}.")
    return found


def standardised(
    values: Sequence[Sequence[float]], scale: CreditScale, sum_over_ranks: Callable[[Tensor], Tensor]
) -> list[list[float]]:
    """Credit of each query, relative to the others: (value - mean) / (std + 1e-6).

    The standard deviation is that of a sample (ddof 1). Values that are all equal give exactly 0.

    Args:
        values: one row per group, a value per executed query in it.
        scale: step takes mean and deviation over all queries of the step, on all ranks; group over those of the group;
            none leaves values as they are.
        sum_over_ranks: sums a tensor over processes; called twice for `step`, on every rank.
    """
    if scale == "none":
        return [list(row) for row in values]
    rows = [torch.tensor(row, dtype=torch.float64) for row in values]
    if scale == "group":
        return [_relative(row, row.sum(), torch.tensor(len(row)), _alone).tolist() for row in rows]
    whole = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.float64)
    total, count = sum_over_ranks(torch.tensor([whole.sum(), len(whole)], dtype=torch.float64))
    relative = _relative(whole, total, count, sum_over_ranks)
    return [part.tolist() for part in relative.split([len(row) for row in rows])] if rows else []


def _relative(values: Tensor, total: Tensor, count: Tensor, sum_over_ranks: Callable[[Tensor], Tensor]) -> Tensor:
    centered = values - total / count.clamp(min=1)
    std = (sum_over_ranks(centered.square().sum()[None])[0] / (count - 1).clamp(min=1)).sqrt()
    # The mean of equal floats can be one ulp off, and 1e-17 / 1e-6 is not 0.
    if std <= 1e-12 * max(1.0, abs(float(total))):
        return torch.zeros_like(values)
    return centered / (std + EPSILON)


def _alone(values: Tensor) -> Tensor:
    return values


class LexicalEvidence(QueryCredit):
    """1 where one passage of a search holds every word of the thought before it, else 0.

    A rule for the embedded world, where a thought names an entity and a relation, and a passage's term begins with the
    relation's name (`rel3` and `rel3_a`). It shows how much credit per search can bring, an upper bound, not a method.

    Args:
        ignored: words of a thought that no passage needs to hold.
    """

    def __init__(self, ignored: Sequence[str] = ("need", "of", "found", "missing")) -> None:
        self.ignored = frozenset(ignored)

    def assign(self, group: RolloutGroup) -> list[list[float]]:
        """1.0 or 0.0 per executed query; 0.0 where the thought says nothing."""
        return [self.evidence(rollout) for rollout in group.trajectories]

    def evidence(self, rollout: Trajectory) -> list[float]:
        """The same for one rollout."""
        thoughts = rollout.thoughts or ("",) * len(rollout.queries)
        return [float(self._holds(*pair)) for pair in zip(thoughts, rollout.passages, strict=True)]

    def _holds(self, thought: str, passages: Sequence[Passage]) -> bool:
        wanted = set(thought.split()) - self.ignored
        found = ({part for word in p.contents.split() for part in (word, word.partition("_")[0])} for p in passages)
        return bool(wanted) and any(wanted <= words for words in found)


class AnswerEvidence(QueryCredit):
    """1 where a passage of a search holds a gold answer, else 0: what open-domain questions can tell of a search."""

    def assign(self, group: RolloutGroup) -> list[list[float]]:
        """1.0 or 0.0 per executed query."""
        golds, rule = group.question.answers, group.question.normalization
        return [
            [float(holds_gold(golds, [p.contents for p in found], rule)) for found in rollout.passages]
            for rollout in group.trajectories
        ]


class SupportEvidence(QueryCredit):
    r"""1 where a search brings a supporting passage that no search before it in the rollout brought, else 0.

    The first search of a multi-hop question rarely finds the answer, so `AnswerEvidence` punishes it; this pays it.
    Only the first time counts: else a policy would earn the same again for repeating its query. A passage is known by
    its title, compared as answers are, or by its id. Passages of one title are one to it, as parts of one article.

    All searches of a question without `Question.support` get 0. Where training has such questions too, standardise by
    `credit_scale: group`: over the step they would fall below its mean, for nothing that they did.

    Example:
        >>> from sdsearch_lightning.types import StopReason
        >>> def found(*titles): return tuple(Passage(title, f'"{title}"\ntext') for title in titles)
        >>> asked = Question("q7", "Which river runs through Italy's capital?", ("Tiber",), support=("Rome", "Tiber"))
        >>> rollout = Trajectory(asked, (0, 0), 0, (), StopReason.ANSWERED, ("a", "b", "c"),
        ...     (found("Rome", "Oslo"), found("Rome"), found("the tiber")))
        >>> SupportEvidence().assign(RolloutGroup(asked, (0, 0), (rollout,)))
        [[1.0, 0.0, 1.0]]
    """

    def assign(self, group: RolloutGroup) -> list[list[float]]:
        """1.0 or 0.0 per executed query."""
        return [list(self._firsts(group.question, rollout)) for rollout in group.trajectories]

    def check_questions(self, questions: Sequence[Question]) -> None:
        """Raises where none of them has support."""
        if not any(question.support for question in questions):
            raise ConfigError(
                f"SupportEvidence: expected training questions that name supporting passages, found none among "
                f"{len(questions)}. Name the place in data.columns, as {{support: metadata.supporting_facts.title}}."
            )

    @staticmethod
    def _firsts(question: Question, rollout: Trajectory) -> Iterator[float]:
        missing = {support: _title(support, question.normalization) for support in question.support}
        for passages in rollout.passages:
            ids = {passage.id for passage in passages}
            titles = {_title(passage.title, question.normalization) for passage in passages} - {""}
            brought = [support for support, title in missing.items() if support in ids or title in titles]
            yield float(bool(brought))
            for support in brought:
                del missing[support]


def _title(text: str, rule: str) -> str:
    """A title as it is compared; one that normalising leaves nothing of ("The The", "!!!") by its letters."""
    return normalize_answer(text, rule) or text.strip(' "').casefold()


class AnchorAdvantage(QueryCredit):
    """A search against other searches from the same state: the reward of its rollout less their mean.

    The state is what siblings have read before the search, as ids of passages in order (the anchors of GiGPO,
    arXiv:2505.10978, without its discount). A search that nobody else made from there gets 0.
    """

    def assign(self, group: RolloutGroup) -> list[list[float]]:
        """Reward minus mean reward of the state's searches, per executed query."""
        rewards: dict[tuple[tuple[str, ...], ...], list[float]] = {}
        for state, reward in (pair for rollout in group.trajectories for pair in self._steps(rollout)):
            rewards.setdefault(state, []).append(reward)
        return [
            [reward - sum(rewards[state]) / len(rewards[state]) for state, reward in self._steps(rollout)]
            for rollout in group.trajectories
        ]

    @staticmethod
    def _steps(rollout: Trajectory) -> Iterator[tuple[tuple[tuple[str, ...], ...], float]]:
        read = [tuple(passage.id for passage in found) for found in rollout.passages]
        for index in range(len(rollout.queries)):
            yield tuple(read[:index]), rollout.reward or 0.0


class EvidenceReward(Reward):
    """Evidence as part of the reward, for comparison: it is gamed, since a policy can earn it without an answer.

        exact match + share * (mean evidence of the rollout's searches)

    Args:
        share: weight of the evidence.
        credit: has `evidence(rollout)`: a number per executed query.
    """

    def __init__(self, share: float = 0.5, credit: LexicalEvidence | None = None) -> None:
        self.share, self.credit, self._answer = share, credit or LexicalEvidence(), ExactMatchReward()

    def score(self, trajectory: Trajectory) -> float:
        """Exact match and evidence; without a search exact match alone."""
        found = self.credit.evidence(trajectory)
        return self._answer.score(trajectory) + (self.share * sum(found) / len(found) if found else 0.0)
