"""The teacher's gate on policies whose teacher is better, no other, or worse by construction; and its statistics."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import teacher_gate
from benchmarks.gate_arms import answer_anew, behaviour, sample_groups
from benchmarks.gate_logprobs import query_logprobs
from benchmarks.gate_report import STUDENT, TEACHER, Found, render, to_dict, verdict
from benchmarks.gate_statistics import Estimate, is_above, mean_over_groups, paired_over_groups
from helpers.passages import ToyRetriever
from helpers.players import ScriptedEngine
from helpers.training import make_module
from helpers.training_rollouts import (
    TRAINING_CODEC,
    TRAINING_LIMITS,
    TRAINING_PASSAGES,
    TRAINING_PROTOCOL,
    TRAINING_WORDS,
    three_groups,
)
from sdsearch_lightning.errors import DataError, RetrievalError, RolloutError
from sdsearch_lightning.hindsight import LeaveOneOut, QueriesAndLabels
from sdsearch_lightning.losses.logprobs import log_softmax
from sdsearch_lightning.policy.packing import PackedSequences
from sdsearch_lightning.rollout import SearchPool
from sdsearch_lightning.rollout.groups import GroupSampler
from sdsearch_lightning.scoring.rewards import ExactMatchReward, F1LabelRule
from sdsearch_lightning.scoring.scoring import Scoring
from sdsearch_lightning.types import HindsightBlock, Label, Question, RolloutRequest, SpanKind

WORDS = TRAINING_WORDS[:7]
QUESTIONS = {(0, i): Question(f"q{i}", f"where is {word}", ("Rome",), "toy") for i, word in enumerate(WORDS)}
SIZE, SAMPLES = 3, 4
HOPELESS = 5
"""The question with this place and those after it are never answered without a block."""


def turns(word: str, is_right: bool) -> str:
    return f"<search> capital of {word} </search> <answer> {'Rome' if is_right else 'Oslo'} </answer>"


def player(better: bool, leaks: bool = False) -> Any:
    """A policy that answers right the first time only; as teacher always, or never, where the labels are the true ones.

    Those are told from other labels by the first rollout of a group, whose entry stands first in a block.
    """

    def script(request: RolloutRequest) -> str:
        word, prompt = request.question.text.split()[-1], TRAINING_CODEC.decode(request.prompt_ids)
        is_right = request.rollout_index == 0 and request.instance_id[1] < HOPELESS
        if f"siblings CORRECT capital of {word}" in " ".join(prompt.split()):
            is_right = better
        return turns(word, is_right or (leaks and "siblings" in prompt and request.instance_id[1] >= HOPELESS))

    return script


def sampler_of(script: Any, fail: Any = lambda queries: None) -> GroupSampler:
    pool = SearchPool(ToyRetriever(TRAINING_PASSAGES, fail), 1)
    scoring = Scoring(ExactMatchReward(), F1LabelRule())
    policy = torch.nn.Linear(1, 1)
    return GroupSampler(
        policy,  # type: ignore[arg-type]
        TRAINING_PROTOCOL,
        TRAINING_CODEC,
        ScriptedEngine(script),
        pool,
        scoring,
        TRAINING_LIMITS,
    )


def measured(script: Any, questions: Mapping[Any, Question] = QUESTIONS) -> Found:
    sampler = sampler_of(script)
    try:
        return teacher_gate.measure(make_module(), sampler, questions, SIZE, SAMPLES)
    finally:
        sampler.searches.close()


@pytest.fixture(scope="module")
def better() -> Found:
    return measured(player(better=True))


def test_a_teacher_that_is_better_because_of_the_labels(better: Found) -> None:
    assert better.counts == {"all": 7, "mixed": 5, "all right": 0, "all wrong": 2}
    scores = {arm: found.exact_match.mean for arm, found in better.mixed.items() if found.exact_match}
    assert scores == {STUDENT: 0.25, TEACHER: 1.0, "shuffled labels": 0.25, "no labels": 0.25, "placebo": 0.25}
    assert all(found.exact_match and found.exact_match.n == 5 * SAMPLES for found in better.mixed.values())
    assert better.mixed[TEACHER].minus_student == Estimate(0.75, 0.75, 0.75, 20, 5)
    told = "groups: 7 (5 mixed, 0 all right, 2 all wrong)"
    assert verdict(better, 20) == f"teacher above student: yes; above shuffled labels: yes; {told}"
    assert verdict(better, 21) == (
        f"teacher above student: n too small (20 of 21); above shuffled labels: n too small (20 of 21); {told}"
    )


def test_a_teacher_that_is_no_other_and_one_that_is_worse() -> None:
    same = measured(lambda request: turns(request.question.text.split()[-1], request.rollout_index == 0))
    assert verdict(same, 1).startswith("teacher above student: not told apart; above shuffled labels: not told apart;")
    worse = measured(player(better=False))
    assert worse.mixed[TEACHER].minus_student == Estimate(-0.25, -0.25, -0.25, 20, 5)
    assert verdict(worse, 1).startswith("teacher above student: no; above shuffled labels: no;")


def test_a_block_that_helps_by_its_queries_alone() -> None:
    def script(request: RolloutRequest) -> str:
        is_read = "siblings" in TRAINING_CODEC.decode(request.prompt_ids)
        return turns(request.question.text.split()[-1], is_read or request.rollout_index == 0)

    found = measured(script)
    assert verdict(found, 1).startswith("teacher above student: yes; above shuffled labels: not told apart;")
    assert found.mixed["no labels"].minus_student == found.mixed[TEACHER].minus_student


def test_a_leak_shows_where_no_rollout_was_correct(better: Found) -> None:
    clean, leaking = better.all_wrong, measured(player(better=True, leaks=True)).all_wrong
    assert set(clean) == {STUDENT, TEACHER}, "other arms have nothing to tell there"
    assert clean[TEACHER].minus_student == Estimate(0.0, 0.0, 0.0, 2, 2), "one sample of each of two groups"
    assert leaking[TEACHER].minus_student == Estimate(1.0, 1.0, 1.0, 2, 2)
    assert leaking[STUDENT].exact_match == clean[STUDENT].exact_match == Estimate(0.0, 0.0, 0.0, 2, 2)


def test_arms_share_seeds_prompts_differ_and_all_run_at_once() -> None:
    sampler = sampler_of(player(better=True))
    with_engine: ScriptedEngine = sampler.engine  # type: ignore[assignment]
    groups = sample_groups(sampler, QUESTIONS, SIZE, 0.0)
    assert [request.seed for request in with_engine.requests] == [
        request.seed for request in sampler.requests([*QUESTIONS.values()], [*QUESTIONS], SIZE)
    ], "groups are those of a training step"
    arms = {STUDENT: None, TEACHER: QueriesAndLabels()}
    answers = answer_anew(sampler, [teacher_gate.Asked(groups.mixed, arms, 2)], 7, 0.0)
    sampler.searches.close()
    student, teacher = with_engine.requests[:10], with_engine.requests[10:]
    assert [r.seed for r in student] == [r.seed for r in teacher] and len({r.seed for r in student}) == 10
    assert all(own.prompt_ids != other.prompt_ids for own, other in zip(student, teacher, strict=True))
    assert not {r.seed for r in student} & {r.seed for r in sampler.requests([*QUESTIONS.values()], [*QUESTIONS], 2)}
    assert set(answers[0][STUDENT]) == set(answers[0][TEACHER]) == {((0, i), k) for i in range(5) for k in range(2)}


def test_failed_searches_are_nobodys_doing_until_they_are_too_many() -> None:
    def fail(queries: Any) -> None:
        if any("Oslo" in query for query in queries):
            raise RetrievalError("no such host")

    sampler = sampler_of(player(better=True), fail)
    with pytest.raises(RolloutError, match=r"^3 of 21 rollouts ended in a retrieval error.* allows 10%.*no such host"):
        sample_groups(sampler, QUESTIONS, SIZE, 0.1)
    groups = sample_groups(sampler, QUESTIONS, SIZE, 0.2)
    assert groups.counts == {"all": 7, "mixed": 4, "all right": 0, "all wrong": 2, "without outcome": 1}
    sampler.searches.close()


def test_nothing_to_compare_is_said_in_one_line() -> None:
    with pytest.raises(DataError, match=r"^teacher_gate: .* found none \(groups: 2 all, 0 mixed, 0 all right, 2 all"):
        measured(player(better=True), {key: q for key, q in QUESTIONS.items() if key[1] >= HOPELESS})


def test_what_rollouts_did_is_counted_by_hand() -> None:
    groups = three_groups()[:1]
    right, wrong, direct = groups[0].trajectories
    answers = {((0, 0), i): t for i, t in enumerate((right, wrong, direct))}
    assert behaviour(answers, groups) == {
        "reward": pytest.approx(1 / 3),
        "valid_action_rate": 1.0,
        "searches": 1.0,
        "cut_off": 0.0,
        "correct_first_query": pytest.approx(1 / 3),
    }
    asked_twice = replace(wrong, queries=(" THE  river",), num_invalid_actions=2)
    found = behaviour({((0, 0), 0): asked_twice}, groups)
    assert found["correct_first_query"] == 1.0 and found["valid_action_rate"] == 0.5
    unlabelled = [replace(groups[0], trajectories=(replace(right, label=Label.INCORRECT),))]
    assert behaviour(answers, unlabelled)["correct_first_query"] is None, "not measured is not 0"


def by_hand(module: Any, groups: Any, blocks: list[HindsightBlock | None]) -> dict[tuple[int, int], list[float]]:
    """Log-probs of the query tokens behind a block ("" for None), by rollout and span, in passes of their own."""
    found = {}
    for t in groups[0].trajectories:
        text = blocks[0].views_of(t.rollout_index)[0].text if blocks[0] else ""
        prompt = TRAINING_PROTOCOL.prompt_ids(TRAINING_CODEC, t.question.text, text)
        ids = [*prompt, *t.token_ids[t.prompt_length :]]
        start = len(prompt)
        for index, span in enumerate(t.spans[1:], 1):
            if span.kind is SpanKind.QUERY:
                targets = torch.arange(start, start + len(span.token_ids))
                rows = log_softmax(module.policy.logits(PackedSequences.pack([ids]), targets))
                found[t.rollout_index, index] = rows[range(len(span.token_ids)), span.token_ids].tolist()
            start += len(span.token_ids)
    return found


def test_logprobs_of_student_and_both_teachers() -> None:
    module, groups = make_module().eval(), three_groups()[:1]
    found = query_logprobs(module, groups)
    assert found is not None and (found.queries, found.correct_queries) == (3, 2)
    with torch.no_grad():
        texts = [
            [None],
            *(b.build(groups, "all", TRAINING_PROTOCOL, TRAINING_CODEC) for b in (QueriesAndLabels(), LeaveOneOut())),
        ]
        student, own, others = (by_hand(module, groups, blocks) for blocks in texts)
    figures = found.student, found.teacher_with_own, found.teacher_without_own
    for value, rows in zip(figures, (student, own, others), strict=True):
        tokens = [v for row in rows.values() for v in row]
        assert found.tokens == len(tokens) and value == pytest.approx(np.mean(tokens), abs=1e-9)
    for auc, teacher in ((found.auc_with_own, own), (found.auc_without_own, others)):
        ratio = {key: np.mean(teacher[key]) - np.mean(student[key]) for key in student}
        (wrong,) = [value for (rollout, _), value in ratio.items() if rollout == 1]
        assert auc == np.mean([value > wrong for (rollout, _), value in ratio.items() if rollout == 0])
    assert len({round(value, 6) for value in figures}) == 3, "the three read different texts"
    assert query_logprobs(module, []) is None


def test_intervals_against_the_closed_form() -> None:
    rng = np.random.default_rng(3)
    values = {((0, i), 0): float(v) for i, v in enumerate(rng.normal(0.3, 1.0, 400))}
    found = mean_over_groups(values)
    row = np.array([*values.values()])
    half = 1.959964 * row.std() / math.sqrt(len(row))
    assert found is not None and (found.n, found.groups) == (400, 400) and found.low and found.high
    assert found.low == pytest.approx(row.mean() - half, abs=0.05 * half)
    assert found.high == pytest.approx(row.mean() + half, abs=0.05 * half)
    copies = mean_over_groups({(key, k): v for (key, _), v in values.items() for k in range(4)})
    assert copies == Estimate(found.mean, pytest.approx(found.low), pytest.approx(found.high), 1600, 400), (
        "equal answers of one group tell nothing new"
    )
    assert mean_over_groups({((0, 0), 0): 0.0, ((0, 1), 0): 1.0}) == Estimate(0.5, 0.0, 1.0, 2, 2), "1/4, 1/2, 1/4"
    assert mean_over_groups({((0, 0), 0): 0.0, ((0, 0), 1): 1.0}) == Estimate(0.5, None, None, 2, 1)
    assert mean_over_groups({}) is None and paired_over_groups({((0, 0), 0): 1.0}, {((0, 1), 0): 1.0}) is None


def test_pairs_are_of_one_group_and_sample() -> None:
    own = {((0, 0), 0): 1.0, ((0, 0), 1): 0.0, ((0, 1), 0): 1.0}
    other = {((0, 0), 0): 0.0, ((0, 1), 0): 1.0, ((0, 2), 0): 1.0}
    assert paired_over_groups(own, other) == Estimate(0.5, 0.0, 1.0, 2, 2)
    assert paired_over_groups(own | {((0, 1), 0): 0.9}, other) != paired_over_groups(own, other)


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [
        (0.001, 0.2, "yes"),
        (-0.2, -0.001, "no"),
        (0.0, 0.2, "not told apart"),
        (-0.1, 0.3, "not told apart"),
        (None, None, "not told apart"),
    ],
)
def test_only_an_interval_beside_zero_decides(low: float | None, high: float | None, told: str) -> None:
    assert is_above(Estimate(0.1, low, high, 200, 50), 200) == told
    assert is_above(Estimate(0.1, low, high, 199, 50), 200) == "n too small (199 of 200)"
    assert is_above(None, 200) == "n too small (0 of 200)"


def test_tables_and_json_say_the_same(better: Found) -> None:
    lines = list(render(better, 20))
    (teacher,) = [line for line in lines[: lines.index("")] + lines if line.startswith("| teacher | 20 |")]
    assert "| 1.000 [1.000, 1.000] | +0.750 [+0.750, +0.750] |" in teacher
    told = json.loads(json.dumps(to_dict(better, 20)))
    assert told["verdict"] == lines[-1] == verdict(better, 20)
    assert told["mixed"][TEACHER]["minus_student"]["mean"] == 0.75 and told["mixed"][STUDENT]["minus_student"] is None
    assert told["counts"] == better.counts and told["logprobs"]["queries"] == 15


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "expected --run RUN"),
        (["--run", "nowhere"], "run: expected a run folder with config.yaml, found none at nowhere"),
        (["--model", "./nowhere"], "model: expected a model folder or a hub name, found nothing at ./nowhere"),
        (["--run", "x", "--samples", "0"], "samples: expected at least 1, found 0"),
        (["--run", "x", "--out", "no/such/file.json"], "out: expected a file in a folder that is there"),
        (["--run", "x", "--split", "dev"], "split"),
    ],
)
def test_a_wrong_command_is_told_in_a_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert teacher_gate.main(argv) == 2
    told = capsys.readouterr()
    assert message in told.err and not told.out
    assert "Traceback" not in told.err and len(told.err.splitlines()) <= 3
