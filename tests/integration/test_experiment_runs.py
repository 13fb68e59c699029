"""Every file of configs/experiment runs two steps on a tiny model, and its teacher, where it has one, is heard."""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path

import pytest

from helpers.paths import ROOT
from sdsearch_lightning.__main__ import main
from sdsearch_lightning.datamodules.synthetic_world_generation import WorldShape
from sdsearch_lightning.policy.loading import ScratchModel, from_scratch, word_level_tokenizer
from sdsearch_lightning.protocol.templates import Protocol

CONFIGS = ROOT / "configs"
FILES = [
    *sorted((CONFIGS / "experiment/ablation").glob("*.yaml")),
    *sorted((CONFIGS / "experiment/preset").glob("*.yaml")),
]
WORLD = {
    "num_entities": 60,
    "num_relations": 4,
    "facts_per_entity": 4,
    "num_train_questions": 30,
    "num_val_questions": 2,
}
TAUGHT_BY_NOBODY = {"best", "grpo", "dr_grpo", "dapo", "sharpening_control", "search_r1", "autorefine", "ig_search"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random model with the tokenizer of the small world; 128 words, as many as the presets' top_k needs."""
    import torch

    folder = tmp_path_factory.mktemp("model")
    protocol = Protocol(prompt="{question}", documents_tag="documents")
    words = WorldShape(WORLD["num_entities"], WORLD["num_relations"], 4, WORLD["facts_per_entity"]).vocabulary
    tokenizer = word_level_tokenizer([*words, *(f"filler{i}" for i in range(64))], protocol.tags)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = from_scratch(ScratchModel(options=sizes | {"num_key_value_heads": 2}), tokenizer, torch.float32, 0)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(model: Path, folder: Path, *files: Path) -> list[dict[str, float]]:
    """Two steps through the command line; the rows of metrics.csv that hold a loss."""
    data = [f"--data.{name}={value}" for name, value in WORLD.items()]
    arguments = [
        "fit",
        *(f"--config={path}" for path in (CONFIGS / "quickstart.yaml", *files)),
        *data,
        f"--data.cache_dir={model.parent}",
        "--data.batch_size=2",
        f"--model.model_name_or_path={model}",
        f"--model.protocol={CONFIGS / 'protocol/synthetic_world.yaml'}",  # presets of others bring words it lacks
        "--rollout.engine=helpers.worlds.WorldEngine",
        "--rollout.group_size=3",
        "--rollout.eval_samples=0",
        "--jsd.warmup_steps=0",
        "--trainer.max_steps=2",
        "--trainer.enable_progress_bar=false",
        f"--run.root={folder}",
    ]
    assert main(arguments) == 0
    (metrics,) = folder.glob("*/metrics.csv")
    with metrics.open() as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    return [row for row in rows if "train/loss" in row]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_two_steps(path: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(model, tmp_path, path)
    assert len(rows) == 2 and all(math.isfinite(row["train/loss"]) for row in rows)
    assert all(row["train/skipped_updates"] == 0 and row["train/grad_norm"] >= 0 for row in rows)
    heard = sum(row["distill/teacher_rows"] for row in rows)
    assert (heard == 0) is (path.stem in TAUGHT_BY_NOBODY), "the teacher is heard exactly where there is one"
    capsys.readouterr()


def test_the_quick_start_itself(model: Path, tmp_path: Path) -> None:
    rows = run(model, tmp_path)
    assert len(rows) == 2 and rows[1]["distill/teacher_rows"] > 0
    assert not (tmp_path / "other").exists() and sorted(os.listdir(tmp_path)) == [".quickstart.lock", "quickstart"]
