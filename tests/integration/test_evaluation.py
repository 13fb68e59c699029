"""Evaluations one can publish: seven benchmarks in one table, two checkpoints of one run, and the card of an export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

pytestmark = pytest.mark.slow
SEVEN = {
    "nq": "test", "triviaqa": "test", "popqa": "test", "hotpotqa": "dev", "2wikimultihopqa": "dev", "musique": "dev",
    "bamboogle": "test",
}  # fmt: skip


def test_seven_benchmarks_in_one_table_without_a_run(workplace: Any) -> None:
    for place, (name, split) in enumerate(SEVEN.items()):
        folder = workplace.path / "bench" / name
        folder.mkdir(parents=True)
        rows = [{"question": f"question e{i} the rel{place % 4} ?", "golden_answers": ["e1", "e2"]} for i in range(5)]
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    corpus = str(next((workplace.path / "cache").glob("world-*/corpus.jsonl")))
    done = workplace.sdsearch(
        "test", "--model.model_name_or_path", "runs/rl/model", "--model.protocol", "autorefine",
        "--data", "SearchDataModule", f"--data.test_files={json.dumps(list(SEVEN))}", "--data.hub", "bench",
        "--data.limit_per_source", "3", "--data.retriever", "BM25Retriever", "--data.retriever.corpus", corpus,
        "--rollout.max_turn_tokens", "8", "--rollout.max_tokens", "200", "--rollout.max_searches", "2",
        "--rollout.max_observation_tokens", "16", "--run.name", "seven", "--trainer.accelerator", "cpu",
        "--trainer.enable_progress_bar", "false",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split()[0] for line in done.stdout.splitlines() if "[" in line and "]" in line and "%" not in line]
    assert rows == [*SEVEN, "macro"], done.stdout
    assert "test/nq/exact_match" not in done.stdout, "Lightning's own table"
    (folder,) = (workplace.run("seven") / "test").glob("[!.]*")
    assert folder.name == "runs-rl-model"
    found = json.loads((folder / "evaluation.json").read_text())
    assert [(row["source"], row["questions"]) for row in found["sources"]] == [(name, 3) for name in SEVEN]
    assert (found["step"], found["limit_per_source"], found["decoding"]["max_searches"]) == (0, 3, 2)
    logged = workplace.metrics("seven/test/runs-rl-model")[0]
    for row in found["sources"]:
        assert float(logged[f"test/{row['source']}/f1"]) == pytest.approx(row["f1"]["value"], abs=1e-6)
        assert float(logged[f"test/{row['source']}/searches_per_question"]) == pytest.approx(
            row["searches_per_question"]
        )
    assert (folder / "evaluation.md").read_text().count("\n| ") == 9
    assert "macro average" in workplace.sdsearch("report", "runs/seven").stdout


@pytest.fixture(scope="module")
def run(workplace: Any) -> Path:
    """runs/judged: a copy of runs/rl, whose folder other tests count the files of."""
    return Path(shutil.copytree(workplace.run("rl"), workplace.run("judged"), symlinks=True))


def judge(workplace: Any, command: str, *more: str) -> None:
    done = workplace.sdsearch(command, "--config", "fit.yaml", "--run.name", "judged", *more)
    assert (done.returncode, done.stderr) == (0, "")


def test_two_checkpoints_of_one_run_are_both_found_and_told_by_their_step(workplace: Any, run: Path) -> None:
    checkpoints = sorted((run / "checkpoints").glob("step_*.ckpt"))
    assert len(checkpoints) >= 2
    for checkpoint in checkpoints[-2:]:
        judge(workplace, "validate", "--ckpt_path", str(checkpoint.relative_to(workplace.path)))
    judge(workplace, "validate")
    folders = {p.parent.name: json.loads(p.read_text()) for p in (run / "validate").glob("*/*.json")}
    steps = {int(checkpoint.stem.removeprefix("step_")) for checkpoint in checkpoints[-2:]}
    assert {found["step"] for found in folders.values()} == {0, *steps}
    assert set(folders) == {"runs-cold-model", *(f"step_{step:08d}" for step in steps)}
    for name, found in folders.items():
        lines = (run / "validate" / name / "trajectories.jsonl").read_text().splitlines()
        assert {json.loads(line)["step"] for line in lines} == {found["step"]}
        assert found["sampled"]["samples"] == 1
    last = workplace.metrics("judged")[-1]
    mine = folders[f"step_{max(steps):08d}"]["sources"][0]
    assert mine["exact_match"]["value"] == pytest.approx(float(last["val/exact_match"]), abs=1e-6)
    shown = workplace.sdsearch("report", "runs/judged").stdout
    assert all(f"validate/step_{step:08d}" in shown for step in steps) and "exact match, greedy" in shown
    assert not any("validate" in name for name in workplace.contents("judged")["file names"]), "no part of the run"


def test_the_card_of_an_export_has_the_evaluation_of_its_weights(workplace: Any, run: Path, tmp_path: Path) -> None:
    judge(workplace, "test", "--ckpt_path", "last")
    outputs = {}
    for step in ("00000006", "00000008"):
        done = workplace.sdsearch(
            "export", "--ckpt_path", f"runs/judged/checkpoints/step_{step}.ckpt", "--output", str(tmp_path / step)
        )
        assert done.returncode == 0, done.stderr
        outputs[step] = ModelCard((tmp_path / step / "README.md").read_text())
    assert outputs["00000006"].data.eval_results is None
    results = [r for r in outputs["00000008"].data.eval_results if r.metric_type == "exact_match"]
    found = json.loads((run / "test/step_00000008/evaluation.json").read_text())
    assert [r.metric_value for r in results] == [source["exact_match"]["value"] for source in found["sources"]]
    assert results[0].metric_args["step"] == 8 and results[0].metric_args["decoding"] == "greedy"
    assert "## test of step_00000008, step 8" in outputs["00000008"].text
