"""examples/real_facts on its own packages: the same bytes twice, and a walk from a cold start to an answer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from examples.real_facts import prepare
from helpers.paths import ROOT
from sdsearch_lightning.scoring.normalization import normalize_answer

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800), pytest.mark.filterwarnings("ignore")]
TEXTS = ("corpus.jsonl", "train.jsonl", "dev.jsonl", "test.jsonl")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that `make real` prepares."""
    folder = tmp_path_factory.mktemp("facts")
    assert prepare.main(["--output", str(folder)]) == 0
    return folder


def test_twice_gives_the_same_bytes(facts: Path, tmp_path: Path) -> None:
    prepare.write_texts(tmp_path, 0)
    assert all((facts / name).read_bytes() == (tmp_path / name).read_bytes() for name in TEXTS)
    again = (facts / "demonstrations.jsonl").read_bytes()
    prepare.write_searched(facts, 0)
    assert (facts / "demonstrations.jsonl").read_bytes() == again
    prepare.write_texts(tmp_path, 1)
    assert all((facts / name).read_bytes() != (tmp_path / name).read_bytes() for name in TEXTS)


def test_held_out_questions_share_no_name_with_training(facts: Path) -> None:
    names = [
        {normalize_answer(name) for row in part for _, *hop in row["metadata"]["hops"] for name in hop}
        for part in (rows(facts / "train.jsonl"), rows(facts / "dev.jsonl") + rows(facts / "test.jsonl"))
    ]
    assert min(map(len, names)) > 500 and not names[0] & names[1]


def test_every_gold_is_at_the_end_of_a_chain_in_the_corpus(facts: Path) -> None:
    corpus = [row["contents"].lower() for row in rows(facts / "corpus.jsonl")]
    for row in rows(facts / "dev.jsonl") + rows(facts / "test.jsonl"):
        for _, subject, found in row["metadata"]["hops"]:
            assert any(subject.lower() in text and found.lower() in text for text in corpus), row
        assert row["golden_answers"] == [row["metadata"]["hops"][-1][2]]


def sdsearch(folder: Path, *argv: str) -> str:
    """Standard output of a command that runs in `folder`."""
    command = [sys.executable, "-m", "sdsearch_lightning", *argv]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_from_a_cold_start_to_an_answer(facts: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/real_facts").symlink_to(facts)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    small = ("--run.num_threads", "1", "--trainer.max_steps", "2")
    sdsearch(tmp_path, "supervise", "--config=configs/real_facts_cold_start.yaml", "--data.batch_size=4", *small)
    tiny = ("--data.batch_size=2", "--data.limit_per_source=1", "--rollout.group_size=3", "--hindsight.groups=all")
    limits = ("--rollout.max_turn_tokens=24", "--rollout.max_searches=1", "--rollout.label=F1LabelRule")
    sdsearch(tmp_path, "fit", "--config=configs/real_facts.yaml", *tiny, *limits, *small, "--jsd.warmup_steps=0")
    run = tmp_path / "runs/real_facts"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["sd"]["active_steps"] > 0 and summary["exact_match"]["after"] is not None
    loaded = AutoModelForCausalLM.from_pretrained(run / "model")
    assert loaded.config.model_type == "llama" and loaded.num_parameters() > 1.3e8
    asked = "What currency is used in the country whose capital is Nairobi?"
    answer = json.loads(sdsearch(tmp_path, "ask", asked, "--run", str(run), "--json"))
    assert answer["question"] == asked and set(answer) >= {"answer", "queries", "passages", "stop_reason"}
