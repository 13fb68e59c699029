"""Groups of scored rollouts over a few dozen words, for the training side.

Trajectories come out of the real `Conversation`, so their spans are those of a run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from helpers.players import play
from sdsearch_lightning.errors import RetrievalError
from sdsearch_lightning.hindsight import QueriesAndLabels
from sdsearch_lightning.policy.loading import word_level_tokenizer
from sdsearch_lightning.protocol.block_templates import BlockTemplates
from sdsearch_lightning.protocol.conversation import Conversation
from sdsearch_lightning.protocol.templates import Protocol
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.types import (
    Demonstration,
    HindsightBlock,
    Label,
    Limits,
    Passage,
    Question,
    RolloutGroup,
    RolloutRequest,
    SiblingRecord,
    SpanKind,
    Trajectory,
)

TRAINING_PROTOCOL = Protocol(
    prompt="{question}",
    question_mark=False,
    documents_tag="documents",
    passage_template="{contents}\n",
    invalid_message=" invalid action ",
    block=BlockTemplates(
        header=" siblings", entry="", query=" {label} {query} ;", no_query=" {label} none ;", unlabelled_entry=""
    ),
)
TRAINING_WORDS = (
    "Rome Oslo Italy Norway capital of river where is the siblings CORRECT INCORRECT none ; invalid action".split()
)
TRAINING_TOKENIZER = word_level_tokenizer(TRAINING_WORDS, TRAINING_PROTOCOL.tags)
TRAINING_CODEC = TokenCodec(TRAINING_TOKENIZER, TRAINING_PROTOCOL.tags)
TRAINING_QUESTION = Question("q0", "where is Rome", ("Rome",), "toy")
TRAINING_PASSAGES = (Passage("d0", "Rome is the capital of Italy"), Passage("d1", "Oslo is the capital of Norway"))
TRAINING_LIMITS = Limits(max_searches=3, max_turn_tokens=32, max_observation_tokens=24, max_tokens=160)

DIRECT = "<think> the river </think> <answer> Oslo </answer>"
ONE = "<think> where </think> <search> capital of Italy </search> <answer> Rome </answer>"
TWO = "<search> the river </search> <think> Oslo </think> <search> Norway </search> <answer> Rome of Italy </answer>"
SCRIPTS = (DIRECT, ONE, TWO)


def wave(position: int) -> float:
    """A log-prob that differs from one token to the next."""
    return -3 + 0.5 * math.sin(1.7 * position)


def rollout(
    text: str, index: int = 0, advantage: float = 1.0, label: Label | None = Label.CORRECT, position: int = 0
) -> Trajectory:
    """A scored rollout; without a label, its first search fails."""
    question = replace(
        TRAINING_QUESTION, id=f"q{position}", text=f"{TRAINING_QUESTION.text} {TRAINING_WORDS[position]}"
    )
    request = RolloutRequest(
        question, (0, position), index, TRAINING_PROTOCOL.prompt_ids(TRAINING_CODEC, question.text), seed=0
    )
    found = TRAINING_PASSAGES if label else RetrievalError("no such host")
    conversation = Conversation(request, TRAINING_PROTOCOL, TRAINING_CODEC, TRAINING_LIMITS)
    played = play(conversation, TRAINING_CODEC, text, lambda query: found, wave)
    return replace(played, reward=float(label is Label.CORRECT), advantage=advantage, label=label)


def group(*rollouts: Trajectory) -> RolloutGroup:
    return RolloutGroup(rollouts[0].question, rollouts[0].instance_id, rollouts)


def three_groups() -> list[RolloutGroup]:
    """A mixed group, one without contrast, and one in which a search failed: nine rollouts, five of them with queries
    that count."""
    right, wrong = Label.CORRECT, Label.INCORRECT
    return [
        group(rollout(TWO, 0, 1.2, right), rollout(ONE, 1, -0.4, wrong), rollout(DIRECT, 2, -0.8, wrong)),
        group(*(rollout(text, i, 0.0, right, position=1) for i, text in enumerate((ONE, ONE, DIRECT)))),
        group(rollout(TWO, 0, 0.7, right, 2), rollout(ONE, 1, 0.0, None, 2), rollout(DIRECT, 2, -0.7, wrong, 2)),
    ]


def blocks_of(groups: Sequence[RolloutGroup], rule: str = "all") -> list[HindsightBlock | None]:
    return QueriesAndLabels().build(groups, rule, TRAINING_PROTOCOL, TRAINING_CODEC)  # type: ignore[arg-type]


def demonstration(siblings: tuple[SiblingRecord, ...] = ()) -> Demonstration:
    """`ONE` as a written rollout."""
    documents = TRAINING_PROTOCOL.format_passages(TRAINING_PASSAGES)
    turns = ((SpanKind.REASONING, "where"), (SpanKind.QUERY, "capital of Italy"), (SpanKind.OBSERVATION, documents))
    return Demonstration(TRAINING_QUESTION, (*turns, (SpanKind.ANSWER, "Rome")), siblings)
