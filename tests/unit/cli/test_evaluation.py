"""Where an evaluation's result lies: a folder name for each of the weights, that no path of this machine is in."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdsearch_lightning.cli.evaluation import weights_name
from sdsearch_lightning.runs.folder import RunFolder


def options(model: str | None) -> Any:
    return SimpleNamespace(model=SimpleNamespace(model_name_or_path=model))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Qwen/Qwen2.5-3B", "Qwen-Qwen2.5-3B"),
        ("runs/cold/model", "runs-cold-model"),
        ("/home/somebody/models/mine", "mine"),
        ("../up", "up"),
        (None, "scratch"),
        ("/", "model"),
    ],
)
def test_without_a_checkpoint_the_model_is_named(model: str | None, name: str) -> None:
    assert weights_name(options(model), None, RunFolder(Path("runs/mine"))) == name


def test_a_checkpoint_is_named_by_its_step_and_by_its_run_where_it_is_anothers(tmp_path: Path) -> None:
    for run in ("mine", "other"):
        (tmp_path / run / "checkpoints").mkdir(parents=True)
        (tmp_path / run / "checkpoints/step_00000008.ckpt").write_text("")
        (tmp_path / run / "checkpoints/last.ckpt").symlink_to("step_00000008.ckpt")
    names = [
        weights_name(options("m"), SimpleNamespace(step=8, path=path), RunFolder(tmp_path / "mine"))  # type: ignore[arg-type]
        for path in (tmp_path / "mine/checkpoints/last.ckpt", tmp_path / "other/checkpoints/step_00000008.ckpt")
    ]
    assert names == ["step_00000008", "other-step_00000008"]
