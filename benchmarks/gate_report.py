"""The teacher's gate in words: Markdown tables, the verdict in one line, and the same as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.gate_arms import Answers, behaviour, is_right
from benchmarks.gate_logprobs import QueryLogprobs
from benchmarks.gate_statistics import Estimate, is_above, mean_over_groups, paired_over_groups
from benchmarks.markdown import header, number, row
from sdsearch_lightning.types import RolloutGroup

STUDENT, TEACHER, SHUFFLED = "student", "teacher", "shuffled labels"
COLUMNS = (
    "arm",
    "n",
    "EM [95 %]",
    "minus student [95 %]",
    "reward",
    "valid actions",
    "searches",
    "cut off",
    "first query of a CORRECT sibling",
)


@dataclass(frozen=True, slots=True)
class Arm:
    """What one arm answered."""

    exact_match: Estimate | None
    minus_student: Estimate | None
    """Pair by pair; None for the student itself, and where there is no pair."""
    behaviour: Mapping[str, float | None]
    """See `gate_arms.behaviour`."""


@dataclass(frozen=True, slots=True)
class Found:
    """All that the gate measured."""

    counts: Mapping[str, int]
    """Groups by their outcomes."""
    searched: Mapping[str, int]
    """Of the mixed groups, and of those all wrong: in how many a rollout searched, so that there is a block."""
    mixed: Mapping[str, Arm]
    all_wrong: Mapping[str, Arm]
    above_shuffled: Estimate | None
    """EM of the teacher minus that of the same block with shuffled labels, pair by pair, in mixed groups."""
    logprobs: QueryLogprobs | None


def arms_of(answers: Mapping[str, Answers], groups: Sequence[RolloutGroup], seed: int) -> dict[str, Arm]:
    """Scores of every arm, with intervals over groups."""
    right = {arm: {key: is_right(t) for key, t in found.items()} for arm, found in answers.items()}
    return {
        arm: Arm(
            mean_over_groups(values, seed),
            None if arm == STUDENT else paired_over_groups(values, right[STUDENT], seed),
            behaviour(answers[arm], groups),
        )
        for arm, values in right.items()
    }


def above_shuffled(answers: Mapping[str, Answers], seed: int) -> Estimate | None:
    """EM of the teacher minus that of the block with shuffled labels, over the pairs that both answered."""
    teacher, shuffled = ({key: is_right(t) for key, t in answers[arm].items()} for arm in (TEACHER, SHUFFLED))
    return paired_over_groups(teacher, shuffled, seed)


def verdict(found: Found, least: int) -> str:
    """The line that decides; fewer than `least` pairs decide nothing."""
    above, of_labels = is_above(found.mixed[TEACHER].minus_student, least), is_above(found.above_shuffled, least)
    kinds = ", ".join(f"{count} {kind}" for kind, count in found.counts.items() if kind != "all")
    return (
        f"teacher above student: {above}; above shuffled labels: {of_labels}; groups: {found.counts['all']} ({kinds})"
    )


def render(found: Found, least: int) -> Iterator[str]:
    """Tables, log-probs and the verdict, line by line."""
    yield f"Mixed groups ({found.searched['mixed']} of {found.counts['mixed']} in which a rollout searched):"
    yield ""
    yield from _table(found.mixed)
    yield ""
    if found.above_shuffled is not None:
        yield f"teacher minus shuffled labels: {_shown(found.above_shuffled, '+')}, n {found.above_shuffled.n}"
        yield ""
    wrong = f"{found.searched['all wrong']} of {found.counts['all wrong']} in which a rollout searched"
    yield f"Groups without a CORRECT rollout ({wrong}), where a better teacher is suspect:"
    yield ""
    yield from _table(found.all_wrong)
    yield ""
    yield from _logprobs(found.logprobs)
    yield ""
    if found.all_wrong:
        leak = is_above(found.all_wrong[TEACHER].minus_student, least)
        yield f"teacher above student without a CORRECT rollout: {leak}"
    yield verdict(found, least)


def _table(arms: Mapping[str, Arm]) -> Iterator[str]:
    yield from header(COLUMNS)
    for name, arm in arms.items():
        does = arm.behaviour
        cells = [number(does[key], 3) for key in ("reward", "valid_action_rate")]
        cells += [number(does["searches"], 2), number(does["cut_off"], 3), number(does["correct_first_query"], 3)]
        n = 0 if arm.exact_match is None else arm.exact_match.n
        yield row([name, str(n), _shown(arm.exact_match), _shown(arm.minus_student, "+"), *cells])


def _shown(estimate: Estimate | None, sign: str = "") -> str:
    if estimate is None:
        return number(None, 3)
    spread = "" if estimate.low is None else f" [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"
    return f"{estimate.mean:{sign}.3f}{spread}"


def _logprobs(found: QueryLogprobs | None) -> Iterator[str]:
    if found is None:
        yield "Log-probs: no sampled query was read by both teachers."
        return
    yield (
        f"Sampled queries of the mixed groups ({found.queries}, {found.correct_queries} of them of CORRECT rollouts; "
        f"{found.tokens} tokens):"
    )
    yield ""
    yield from header(["", "mean log-prob of a token", "AUC of log T/S, CORRECT against INCORRECT"])
    yield row([STUDENT, number(found.student, 3), number(None, 3)])
    with_own, without = found.auc_with_own, found.auc_without_own
    yield row(["teacher, own rollout in its block", number(found.teacher_with_own, 3), number(with_own, 3)])
    yield row(["teacher, own rollout left out", number(found.teacher_without_own, 3), number(without, 3)])


def to_dict(found: Found, least: int) -> dict[str, Any]:
    """The same as JSON has it; null stands where nothing was measured."""
    return {"verdict": verdict(found, least), "least": least} | asdict(found)
