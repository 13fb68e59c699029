"""What the teacher's gate samples: groups as training does, then answers anew, each arm with another text to read.

Invariant: the draws of one group and sample come from the same seed in every arm, and all arms run in one call of the
engine. Rollouts that ended in a retrieval error are nobody's doing: they are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from sdsearch_lightning.errors import RolloutError
from sdsearch_lightning.hindsight import BlockBuilder, sibling_records
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.rollout.groups import GroupSampler, WindowResult
from sdsearch_lightning.rollout.sampling import derive_seed
from sdsearch_lightning.scoring.rewards import exact_match
from sdsearch_lightning.types import InstanceId, Label, Question, RolloutGroup, RolloutRequest, StopReason, Trajectory

Arms = Mapping[str, BlockBuilder | None]
"""What each arm reads; None: nothing, the student."""
Answers = dict[tuple[InstanceId, int], Trajectory]
"""Scored rollouts of one arm, by group and sample."""


class Asked(NamedTuple):
    """Groups that are answered anew."""

    groups: Sequence[RolloutGroup]
    arms: Arms
    samples: int
    """Of each group, in each arm."""


@dataclass(frozen=True, slots=True)
class SortedGroups:
    """Groups by the outcomes of their rollouts."""

    mixed: tuple[RolloutGroup, ...]
    all_right: tuple[RolloutGroup, ...]
    all_wrong: tuple[RolloutGroup, ...]
    without_outcome: tuple[RolloutGroup, ...]
    """All rollouts ended in a retrieval error."""

    @property
    def counts(self) -> dict[str, int]:
        """How many of each."""
        kinds = {"mixed": self.mixed, "all right": self.all_right, "all wrong": self.all_wrong}
        if self.without_outcome:
            kinds["without outcome"] = self.without_outcome
        return {"all": sum(map(len, kinds.values()))} | {name: len(groups) for name, groups in kinds.items()}


def sample_groups(
    sampler: GroupSampler, questions: Mapping[InstanceId, Question], size: int, max_error_fraction: float
) -> SortedGroups:
    """One group of `size` rollouts of each question, at the sampling of training.

    Raises:
        RolloutError: more of them than `max_error_fraction` ended in a retrieval error.
    """
    requests = sampler.requests([*questions.values()], [*questions], size)
    rollouts = _checked(sampler.run(requests), max_error_fraction)
    kinds: dict[frozenset[Label], list[RolloutGroup]] = {}
    for group in sampler.scoring.groups(rollouts, size):
        kinds.setdefault(frozenset(t.label for t in group.trajectories if t.label is not None), []).append(group)
    both, right, wrong = {Label.CORRECT, Label.INCORRECT}, {Label.CORRECT}, {Label.INCORRECT}
    return SortedGroups(*(tuple(kinds.get(frozenset(kind), ())) for kind in (both, right, wrong, set[Label]())))


def _checked(window: WindowResult, max_error_fraction: float) -> list[Trajectory]:
    failed = sum(t.stop_reason.is_error for t in window.trajectories)
    if failed > max_error_fraction * len(window.trajectories):
        raise RolloutError(
            f"{failed} of {len(window.trajectories)} rollouts ended in a retrieval error; rollout.max_error_fraction "
            f"allows {max_error_fraction:.0%}. Last error: {window.searches.last_error}. Check data.retriever."
        )
    return window.trajectories


def that_searched(groups: Sequence[RolloutGroup], codec: TokenCodec) -> list[RolloutGroup]:
    """Groups of which a block can tell anything."""
    return [group for group in groups if any(record.queries for record in sibling_records(group, codec))]


def answer_anew(
    sampler: GroupSampler, asked: Sequence[Asked], seed: int, max_error_fraction: float
) -> list[dict[str, Answers]]:
    """Answers of every arm, one mapping for each of `asked`; an arm whose builder has no block for a group lacks it.

    Raises:
        RolloutError: as `sample_groups`.
    """
    places: list[tuple[int, str, RolloutGroup]] = []
    requests: list[RolloutRequest] = []
    for part, (groups, arms, samples) in enumerate(asked):
        for arm, builder in arms.items():
            for group, text in zip(groups, _texts(groups, builder, sampler), strict=True):
                if text is None:
                    continue
                prompt_ids = sampler.protocol.prompt_ids(sampler.codec, group.question.text, text)
                places.append((part, arm, group))
                for sample in range(samples):
                    drawn = derive_seed(seed, "gate", group.instance_id, sample)
                    key = group.question, group.instance_id, sample
                    requests.append(RolloutRequest(*key, prompt_ids, drawn, sampler.sampling))
    rollouts = iter(_checked(sampler.run(requests), max_error_fraction))
    found: list[dict[str, Answers]] = [{arm: {} for arm in part.arms} for part in asked]
    for place, arm, group in places:
        scored = sampler.scoring.group([next(rollouts) for _ in range(asked[place].samples)])
        for t in scored.trajectories:
            if not t.stop_reason.is_error:
                found[place][arm][group.instance_id, t.rollout_index] = t
    return found


def _texts(groups: Sequence[RolloutGroup], builder: BlockBuilder | None, sampler: GroupSampler) -> Sequence[str | None]:
    if builder is None:
        return [""] * len(groups)
    blocks = builder.build(groups, "all", sampler.protocol, sampler.codec)
    return [None if block is None else block.text for block in blocks]


def is_right(rollout: Trajectory) -> float:
    """Exact match of its answer."""
    question = rollout.question
    return float(exact_match(rollout.answer, question.answers, question.normalization))


def behaviour(answers: Answers, groups: Sequence[RolloutGroup]) -> dict[str, float | None]:
    """How the rollouts of an arm went, in the mean; None where there is nothing to count.

    Args:
        answers: of the arm.
        groups: whose CORRECT rollouts are looked at for equal first queries.

    Returns:
        `reward`; `valid_action_rate`; `searches` a rollout; `cut_off`, the share that ended by a budget;
        `correct_first_query`, the share whose first query is a first query of a CORRECT sibling, of rollouts whose
        group has one.
    """
    rollouts = [*answers.values()]
    firsts = {
        g.instance_id: {_plain(t.queries[0]) for t in g.trajectories if t.queries and t.label is Label.CORRECT}
        for g in groups
    }
    comparable = [t for t in rollouts if firsts[t.instance_id]]
    acts = sum(len(t.queries) + (t.answer is not None) for t in rollouts)
    tried = acts + sum(t.num_invalid_actions for t in rollouts)
    rewards = [t.reward for t in rollouts if t.reward is not None]
    return {
        "reward": fmean(rewards) if rewards else None,
        "valid_action_rate": acts / tried if tried else None,
        "searches": fmean(len(t.queries) for t in rollouts) if rollouts else None,
        "cut_off": fmean(t.stop_reason is StopReason.MAX_TOKENS for t in rollouts) if rollouts else None,
        "correct_first_query": fmean(
            bool(t.queries) and _plain(t.queries[0]) in firsts[t.instance_id] for t in comparable
        )
        if comparable
        else None,
    }


def _plain(query: str) -> str:
    return " ".join(query.casefold().split())
