"""`ask` from end to end: a question whose answer is there and one whose is not, one after the other, for a program."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from helpers.players import ScriptedEngine
from helpers.workplace import DATA, FIT
from sdsearch_lightning import Asker
from sdsearch_lightning.__main__ import main
from sdsearch_lightning.datamodules import SyntheticWorldDataModule
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.retrieval import DenseRetriever
from sdsearch_lightning.types import Passage, RolloutRequest

pytestmark = pytest.mark.slow
ROOM = ("--rollout.max_turn_tokens", "40", "--rollout.max_tokens", "400")
UNKNOWABLE = "question e999 the rel1 ?"


@pytest.fixture(scope="module")
def golds(workplace: Any) -> dict[str, str]:
    """Answers to questions of the workplace's world, by text."""
    options = yaml.safe_load(DATA)["data"]["init_args"] | {"num_val_questions": 40}
    return {q.text: q.answers[0] for q in SyntheticWorldDataModule(**options).questions("test")}


@pytest.fixture
def knowing(monkeypatch: pytest.MonkeyPatch, golds: dict[str, str]) -> None:
    """A policy that finds the last fact of a question of one hop, and does not stop searching where it knows none."""

    def script(request: RolloutRequest) -> str:
        _, entity, _, relation, *_ = request.question.text.split()
        search = f"<think> need {relation} of {entity} </think> <search> {entity} {relation}_a </search> "
        told = golds.get(request.question.text)
        search = search.replace("e999", "e1")  # a query with an unknown word is no action
        return search * 5 if told is None else f"{search}<answer> {told} </answer>"

    engine = type("Knowing", (ScriptedEngine,), {"__init__": lambda self: ScriptedEngine.__init__(self, script)})
    monkeypatch.setattr("sdsearch_lightning.inference.opening.SlotEngine", engine)


def one_hop(golds: dict[str, str]) -> str:
    return next(text for text in golds if len(text.split()) == 5)


def test_a_right_answer_and_an_unknowable_question(workplace: Any, knowing: None, golds: dict[str, str]) -> None:
    question = one_hop(golds)
    right = workplace.sdsearch("ask", question, "--run", "rl", *ROOM)
    lines = [line.split(maxsplit=1) for line in right.stdout.splitlines()]
    assert right.returncode == 0, right.stderr
    assert [label for label, *_ in lines[:3]] == ["think", "search", "read"]
    assert ["answer", golds[question]] in lines
    assert right.stderr == "runs/rl/model; DenseRetriever; greedy, at most 2 searches\n"
    unknowable = workplace.sdsearch("ask", UNKNOWABLE, "--run", "runs/rl", *ROOM)
    assert unknowable.returncode == 0
    assert "[4]" in unknowable.stdout and "[5]" not in unknowable.stdout, "the third search is not made"
    assert "no answer: max searches" in unknowable.stdout
    assert "the model's vocabulary lacks some words of the question" in unknowable.stdout


def ask_lines(workplace: Any, monkeypatch: pytest.MonkeyPatch, text: str, *more: str) -> Any:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return workplace.sdsearch("ask", "--run", "rl", *ROOM, *more)


def test_one_question_after_the_other_from_standard_input(
    workplace: Any, knowing: None, golds: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    question = one_hop(golds)
    done = ask_lines(workplace, monkeypatch, f"{question}\n\n  {UNKNOWABLE}\n", "--json")
    assert done.returncode == 0 and done.stderr == ""
    first, second = map(json.loads, done.stdout.splitlines())
    assert list(first) == ["question", "answer", "queries", "passages", "stop_reason", "error"]
    assert (first["question"], first["answer"], first["stop_reason"]) == (question, golds[question], "ANSWERED")
    assert len(first["queries"]) == len(first["passages"]) == 1 and len(first["passages"][0]) == 2
    assert (second["answer"], second["stop_reason"]) == (None, "MAX_SEARCHES")
    shown = ask_lines(workplace, monkeypatch, f"{question}\n{UNKNOWABLE}\n")
    assert [line for line in shown.stdout.splitlines() if line.startswith("question")] == [
        f"question  {question}",
        f"question  {UNKNOWABLE}",
    ]


def test_ctrl_c_leaves_with_130_and_no_traceback(workplace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> str:
        raise KeyboardInterrupt

    monkeypatch.chdir(workplace.path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "readline", stop)
    assert main(["ask", "--run", "rl", "--json"]) == 130


def test_the_trained_model_answers_from_run_checkpoint_export_and_python(workplace: Any, golds: dict[str, str]) -> None:
    question, asked = one_hop(golds), ("--json", "--rollout.max_searches", "1")
    done = workplace.sdsearch("ask", question, "--run", "rl", *asked)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert len(told["queries"]) <= 1
    again = workplace.sdsearch("ask", question, "--run", "rl", "--ckpt_path", "last", *asked)
    assert json.loads(again.stdout) == told
    assert (
        workplace.sdsearch("export", "--ckpt_path", "runs/rl/checkpoints/last.ckpt", "--output", "my").returncode == 0
    )
    exported = workplace.sdsearch("ask", question, "--model", "my", *asked)
    assert json.loads(exported.stdout) == told, "protocol, limits and world are in its sdsearch_config.yaml"
    cold = workplace.sdsearch("ask", question, "--run", "cold", *asked)
    assert cold.returncode == 0, cold.stderr


def test_python_asks_several_at_once(workplace: Any, golds: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace.path)
    questions = list(golds)[:3]
    with Asker(run="runs/rl") as asker:
        alone = [asker(question) for question in questions]
        assert [answer.to_dict() for answer in asker(questions)] == [answer.to_dict() for answer in alone]
        with pytest.raises(ConfigError, match=r"question: expected some text.*index 1 of 2"):
            asker(["who ?", " "])

    class Mine:
        def search(self, queries: Any, k: int) -> list[list[Passage]]:
            return [[Passage("mine", "e1")] for _ in queries]

    with Asker(model="runs/rl/model", retriever=Mine(), overrides={"rollout.max_searches": 1}) as asker:
        answer = asker(questions[0])
        assert {p.id for found in answer.passages for p in found} <= {"mine"} and len(answer.queries) <= 1
    with pytest.raises(ConfigError, match="rollout"):
        Asker(run="runs/rl", overrides={"rollout.top_kk": 1})


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["who ?"], "expected --run RUN"),
        ([" ", "--run", "rl"], "question: expected some text, found none."),
        (["who ?", "--run", "none"], "found none at none. In runs/ are: "),
        (["who ?", "--run", "rl", "--rollout.top_kk", "1"], "Did you mean 'rollout.top_k'?"),
        (["who ?", "--run", "rl", "--data.retriever", "null"], "data"),
        (["who ?", "--model", "my", "--jsn"], "unknown key 'jsn'. Did you mean 'json'?"),
        (["who ?", "--model", "runs/rl/model", "--temperature", "-1"], "temperature: expected 0 (greedy) or more"),
    ],
)
def test_usage_errors_are_a_line(workplace: Any, arguments: list[str], told: str) -> None:
    done = workplace.sdsearch("ask", *arguments)
    assert (done.returncode, done.stdout) == (2, ""), done
    assert told in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_a_retriever_that_fails_is_told_and_ends_with_1(
    workplace: Any, knowing: None, golds: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    whole: Callable[..., Any] = DenseRetriever.search

    def broken(self: Any, queries: Any, k: int) -> Any:
        calls.append(1)
        if len(calls) > 1:  # the first is the probe
            raise ConnectionError("no such host")
        return whole(self, queries, k)

    monkeypatch.setattr(DenseRetriever, "search", broken)
    done = workplace.sdsearch("ask", one_hop(golds), "--run", "rl", *ROOM)
    assert done.returncode == 1 and "no answer: retrieval error" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: ConnectionError: no such host")


def test_predict_takes_questions_without_golds(workplace: Any) -> None:
    rows = [{"question": "question e1 the rel1 ?"}, {"question": "question e2 the rel2 ?", "answers": ["e3"]}]
    file = workplace.path / "open.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = yaml.safe_load(FIT) | {"data": {
        "class_path": "SearchDataModule",
        "init_args": {"test_files": "open.jsonl", "retriever": {"class_path": "BM25Retriever", "init_args": {
            "corpus": str(next((workplace.path / "cache").glob("world-*/corpus.jsonl")))}}},
    }}  # fmt: skip
    (workplace.path / "open.yaml").write_text(yaml.safe_dump(data))
    done = workplace.sdsearch("predict", "--config", "open.yaml", "--run.name", "open", "--rollout.eval_samples", "0")
    assert (done.returncode, done.stderr) == (0, "")
    told = done.stdout.splitlines()[-1]
    assert told.startswith("a line for each question: ") and told.endswith("predictions.jsonl")
    lines = [json.loads(line) for line in (workplace.path / told.partition(": ")[2]).read_text().splitlines()]
    assert [line["question"] for line in lines] == [row["question"] for row in rows]
    refused = workplace.sdsearch("test", "--config", "open.yaml", "--run.name", "open")
    assert refused.returncode == 1 and "at least one gold answer, but for `predict`" in refused.stderr
