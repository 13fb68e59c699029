from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.reports import REPORT_TOKENIZER, city_rollout, credit, write_run
from sdsearch_lightning.report.island import island
from sdsearch_lightning.report.rollouts import read_rollouts
from sdsearch_lightning.report.sampling import Survey, key_of, spread
from sdsearch_lightning.report.trajectories import Record, make_record, read_trajectories

STEPS, QUESTIONS = 9, 4


def training() -> list[Record]:
    """Steps of four questions; the third one has a right and a wrong rollout, with verdicts."""
    records = []
    for step in range(1, STEPS + 1):
        for question in range(QUESTIONS):
            for index in range(2):
                answer = "Rome" if question == 2 and index else "Oslo"
                rollout = city_rollout(answer, instance_id=(0, question), index=index)
                options = {"block": "siblings", "credit": credit(rollout)} if question == 2 else {}
                records.append(make_record(rollout, REPORT_TOKENIZER.decode, phase="train", step=step, **options))
    return records


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return training()


@pytest.fixture
def survey(records: list[Record]) -> Survey:
    made = Survey()
    for record in records:
        made.add(record)
    return made


@pytest.mark.parametrize("count", range(6))
def test_steps_are_spread_each_once_from_the_ends(count: int) -> None:
    order = spread(list(range(count)))
    assert sorted(order) == list(range(count))
    assert order[:2] == [0, count - 1][: min(count, 2)]


def test_what_fits_is_taken_whole(survey: Survey) -> None:
    chosen = survey.choose(10**9)
    assert len(chosen) == STEPS * QUESTIONS and chosen == sorted(chosen)
    (told,) = survey.left_out(chosen)
    assert (told.shown, told.groups, told.shown_steps, told.steps) == (36, 36, 9, 9)


def test_ends_come_first_then_a_mixed_group_of_every_step(survey: Survey) -> None:
    sizes = {key: survey._groups[key].total for key in survey._groups}
    ends = [key for key in sizes if key[1] in (1, STEPS)]
    between = [("train", step, (0, 2)) for step in range(2, STEPS)]
    budget = sum(sizes[key] for key in [*ends, *between])
    assert survey.choose(budget) == sorted([*ends, *between])
    few = survey.choose(sum(sizes[key] for key in ends) + 2 * sizes[between[0]])
    assert [key[1] for key in few if key not in ends] == [3, 5]  # the middle, then a quarter


def test_a_smaller_budget_takes_less_and_the_same_each_time(survey: Survey) -> None:
    for budget in (0, 1000, 5000, 20000):
        chosen = survey.choose(budget)
        assert sum(survey._groups[key].total for key in chosen) <= budget
        assert chosen == survey.choose(budget)
    assert survey.choose(0) == []


def test_the_bytes_of_a_group_are_known_before_it_is_built(tmp_path: Path, survey: Survey) -> None:
    path = write_run(tmp_path) / "trajectories.jsonl"
    hostile = path.read_text().replace("Oslo", "<script>\u2028")
    path.write_text(hostile)
    found = Survey()
    for record in read_trajectories(path):
        found.add(record)
    for group in read_rollouts(path, 10**9).groups:
        key = (group["phase"], group["step"], tuple(group["instance"]))
        size = len(island(group | {"run": 0}).encode())
        assert size <= found._groups[key].total <= 1.2 * size


def test_the_rollouts_of_a_run_are_those_of_its_file(tmp_path: Path) -> None:
    path = write_run(tmp_path) / "trajectories.jsonl"
    rollouts = read_rollouts(path, 10**9)
    found = {(g["phase"], g["step"], tuple(g["instance"])): g for g in rollouts.groups}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert set(found) == {key_of(line) for line in lines}
    taught = found["train", 2, (0, 7)]
    assert taught["block"] == "[Rollout 1 | CORRECT]" and taught["outcome"] == "mixed"
    assert [rollout["right"] for rollout in taught["rollouts"]] == [True, False]
    assert all("block" not in rollout for rollout in taught["rollouts"])  # shared: told once
    assert [r["decoding"] for r in found["val", 0, (0, 0)]["rollouts"]] == ["greedy", "sampled"]
    assert rollouts.example.choice == "the first that turned from wrong to right"


def test_no_file_is_no_rollouts(tmp_path: Path) -> None:
    rollouts = read_rollouts(tmp_path / "trajectories.jsonl", 1)
    assert (rollouts.groups, rollouts.left_out, rollouts.example.after) == ((), (), ())
