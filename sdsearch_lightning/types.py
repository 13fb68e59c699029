"""The glossary: every noun of the library, from a question to the batch that meets the loss.

Everything is frozen but `StepBatch`, whose slots are each written once by one writer. `None` means "not assigned yet",
never zero. Masks are bool, True means counted; a mask is born with its token. Letters in shapes: CONTRIBUTING.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from sdsearch_lightning.enums import Label as Label, SpanKind as SpanKind, StopReason as StopReason
from sdsearch_lightning.pluggable import Pluggable as Pluggable

InstanceId = tuple[int, int]
"""(epoch, position in that epoch): unique per prompt instance, so a question that occurs twice makes two groups."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its gold answers, any of which is right.

    >>> rome = Question("q7", "What is the capital of Italy?", ("Rome", "Roma"), source="nq")
    """

    id: str
    text: str
    answers: tuple[str, ...]
    source: str = "default"
    normalization: str = field(default="english", repr=False)  # of answers; checkpoints know a question by the rest
    support: tuple[str, ...] = field(default=(), repr=False)  # titles or ids of the passages that lead to the answer


@dataclass(frozen=True, slots=True)
class Passage:
    """One retrieved passage. `contents` is kept whole: byte-exact observations need it."""

    id: str
    contents: str
    score: float = 0.0
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """First line of `contents`, with its quotes if it has any (the Search-R1 convention)."""
        return self.contents.split("\n")[0]

    @property
    def text(self) -> str:
        """`contents` without its first line."""
        return "\n".join(self.contents.split("\n")[1:])


@dataclass(frozen=True, slots=True)
class SiblingRecord:
    """What a hindsight block tells of one rollout: its executed queries, in order, and its outcome."""

    rollout_index: int
    queries: tuple[str, ...]
    label: Label | None  # None where a block tells no outcome


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A written rollout for the cold start. An OBSERVATION is passages, or their text as the protocol writes it."""

    question: Question
    turns: tuple[tuple[SpanKind, str | tuple[Passage, ...]], ...]
    siblings: tuple[SiblingRecord, ...] = ()  # where not empty, the prompt holds the hindsight block of these


@dataclass(frozen=True, slots=True)
class Span:
    """A run of tokens of one kind from one hand. `logprobs` is there exactly where the policy sampled the tokens.

    >>> query = Span(SpanKind.QUERY, (301, 302), logprobs=(-0.2, -0.1), sampled=True)
    >>> found = Span(SpanKind.OBSERVATION, (17, 18, 19))
    """

    kind: SpanKind
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None
    sampled: bool = False

    def __post_init__(self) -> None:
        assert self.sampled == (self.logprobs is not None), "a span has log-probs exactly where it was sampled"
        assert self.logprobs is None or len(self.logprobs) == len(self.token_ids), "one log-prob per sampled token"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy; log-probs are then those at temperature 1."""

    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Budgets of one rollout. `max_searches` = T means T searches and up to T + 1 generations."""

    max_searches: int = 5
    max_invalid_actions: int = 2
    """Invalid actions that are answered with a message; one more ends the rollout as MALFORMED."""
    max_turn_tokens: int = 512
    """A turn that reaches this without a closed action is an invalid action."""
    max_observation_tokens: int = 512
    """Where passages exceed it together, the longest are cut to one length, inside their tag, which always closes."""
    max_tokens: int = 4096
    """Prompt, policy and observation tokens of one rollout together."""


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """One rollout to run: what it reads first, and the seed that all its draws come from."""

    question: Question
    instance_id: InstanceId
    rollout_index: int
    prompt_ids: tuple[int, ...]
    seed: int
    sampling: Sampling = Sampling()


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One finished rollout. Its first span is the prompt; concatenated spans are exactly what the model saw.

    >>> asked = Trajectory(rome, (0, 4), 0, (Span(SpanKind.PROMPT, (5, 6)), query, found), StopReason.MAX_TOKENS)
    >>> asked.token_ids, asked.policy_mask
    ((5, 6, 301, 302, 17, 18, 19), (False, False, True, True, False, False, False))
    """

    question: Question
    instance_id: InstanceId
    rollout_index: int
    spans: tuple[Span, ...]
    stop_reason: StopReason
    queries: tuple[str, ...] = ()
    """Executed queries, in order."""
    passages: tuple[tuple[Passage, ...], ...] = ()
    """What each executed query returned."""
    thoughts: tuple[str, ...] = ()
    """What the policy wrote before each executed query in the same turn, without tags."""
    answer: str | None = None
    refinements: tuple[str, ...] = ()
    """Text inside refine tags, in order; only protocols with a refine tag have any."""
    num_invalid_actions: int = 0
    num_tagged_queries: int = 0  # those of them that were searches whose query held a tag or a special token
    num_cut_passages: int = 0
    """Passages that were shown in part, for want of room in their observation."""
    format_faults: tuple[str, ...] = ()  # how its turns depart from the form of the prompt, see protocol/form.py
    reward: float | None = None
    advantage: float | None = None
    label: Label | None = None
    query_credit: tuple[float, ...] | None = None
    query_advantages: tuple[float, ...] | None = None
    """What each executed query was worth by itself (`rollout.credit`), and the same standardised; None without."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """[T] every token, prompt included."""
        return tuple(token for span in self.spans for token in span.token_ids)

    @property
    def policy_mask(self) -> tuple[bool, ...]:
        """[T] True where the policy sampled the token: the tokens the policy loss counts."""
        return tuple(span.sampled for span in self.spans for _ in span.token_ids)

    @property
    def sampled_logprobs(self) -> tuple[float, ...]:
        """[T] log-probs under the sampling policy; 0 where the token was not sampled."""
        return tuple(value for span in self.spans for value in span.logprobs or (0.0,) * len(span.token_ids))

    @property
    def prompt_length(self) -> int:
        """Number of prompt tokens."""
        return len(self.spans[0].token_ids)


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """The G rollouts of one prompt instance, once they are scored.

    >>> pair = (replace(asked, reward=1.0, advantage=0.7), replace(asked, rollout_index=1, reward=0.0, advantage=-0.7))
    >>> RolloutGroup(rome, (0, 4), pair).has_signal
    True
    """

    question: Question
    instance_id: InstanceId
    trajectories: tuple[Trajectory, ...]

    def __post_init__(self) -> None:
        strangers = [t.instance_id for t in self.trajectories if t.instance_id != self.instance_id]
        assert not strangers, f"group {self.instance_id} was given rollouts of {strangers}"

    @property
    def has_signal(self) -> bool:
        """Whether rewards differ, so that group-relative advantages are not all zero."""
        return len({t.reward for t in self.trajectories if not t.stop_reason.is_error and t.reward is not None}) > 1

    @property
    def is_mixed(self) -> bool:
        """Whether the group holds both a CORRECT and an INCORRECT rollout."""
        return len({t.label for t in self.trajectories if t.label is not None}) > 1


@dataclass(frozen=True, slots=True)
class TeacherView:
    """The block text that one rollout's teacher reads, at one of its queries or at all of them."""

    rollout_index: int
    query_index: int | None  # counts the rollout's QUERY spans from 0; None = all of them
    text: str
    contrast: str | None = None  # a second text: the verdict on a token is log T after `text` minus that after this one


@dataclass(frozen=True, slots=True)
class HindsightBlock:
    """The text that turns the policy into the teacher: all siblings' queries with their outcomes (paper, h(G)).

    >>> record = SiblingRecord(0, ("capital of Italy",), Label.CORRECT)
    >>> block = HindsightBlock((0, 4), (record,), "[Rollout 1 | CORRECT] search 1: capital of Italy")
    """

    instance_id: InstanceId
    entries: tuple[SiblingRecord, ...]
    text: str
    weight: float = 1.0
    """Weight of this group in the JSD loss, from the `groups` rule; its denominator does not depend on it."""
    views: tuple[TeacherView, ...] | None = None
    """None: every rollout of the group reads `text`. Else what is listed; a rollout without a view is not taught."""

    def views_of(self, rollout_index: int) -> tuple[TeacherView, ...]:
        """What the teacher of one rollout reads."""
        if self.views is None:
            return (TeacherView(rollout_index, None, self.text),)
        return tuple(view for view in self.views if view.rollout_index == rollout_index)


@dataclass(frozen=True, slots=True)
class TokenCredit:
    """What the teacher said of one executed query: one value per token of that QUERY span."""

    span: int  # index into `Trajectory.spans`
    jsd: tuple[float, ...]
    student_logprob: tuple[float, ...]
    teacher_logprob: tuple[float, ...]
    teacher_top: tuple[tuple[tuple[int, float], ...], ...]
    """The teacher's most probable tokens (id, probability) at each position."""


class StepBatch:
    """One rollout batch on its way from questions to the loss: a slot is None until its one writer fills it, once.

    >>> batch = StepBatch([rome])
    >>> batch.groups = (RolloutGroup(rome, (0, 0), ()),)
    >>> batch.hindsight = (None,)  # this group is not taught
    """

    groups: tuple[RolloutGroup, ...] | None
    sampled_groups: tuple[RolloutGroup, ...] | None  # evaluation only
    hindsight: tuple[HindsightBlock | None, ...] | None  # one per group, None = not taught
    credit: tuple[tuple[tuple[TokenCredit, ...] | None, ...], ...] | None  # per rollout, None = no teacher there

    _writers: ClassVar[dict[str, tuple[str, str]]] = {
        "groups": ("RolloutGrouping", "rollout:"),
        "sampled_groups": ("RolloutGrouping", "rollout: (with eval_samples above 0)"),
        "hindsight": ("HindsightConstruction", "hindsight:"),
        "credit": ("SDSearchModule", "model:"),
    }

    def __init__(self, questions: Sequence[Question], instance_ids: Sequence[InstanceId] | None = None) -> None:
        self.questions = tuple(questions)
        self.instance_ids = tuple(instance_ids or ((0, position) for position in range(len(self.questions))))
        assert len(self.questions) == len(self.instance_ids), "one instance id per question"
        self.skipped_updates = 0  # those whose gradient was not finite
        self.__dict__ |= dict.fromkeys(self._writers)

    def __len__(self) -> int:
        return len(self.questions)

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get(name) is not None and name in self._writers:
            raise RuntimeError(f"StepBatch.{name} was already written: {self._writers[name][0]} is its one writer.")
        if name == "hindsight":
            self.require("groups", by="HindsightConstruction")
        object.__setattr__(self, name, value)

    def require(self, name: str, by: str) -> Any:
        """Slot `name`, or an error that says who should have filled it before `by` asked."""
        if (value := getattr(self, name)) is None:
            writer, group = self._writers[name]
            raise RuntimeError(
                f"{by} asked for StepBatch.{name}, which is None: {writer} has to fill it first. "
                f"Is the callback (in a file: {group}) there, and in the order rollout, hindsight, jsd?"
            )
        return value
