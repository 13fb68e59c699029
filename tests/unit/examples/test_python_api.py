"""examples/python_api.py, a few steps of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from helpers.workplace import ROOT


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`")  # a cold start
def test_a_model_is_made_trained_and_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("python_api", ROOT / "examples" / "python_api.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    example.cold_start(2, tmp_path / "cold_start")
    with pytest.warns(UserWarning, match="jsd: the weight stays 0 for all 1 steps"):
        example.train(1, tmp_path / "cold_start", tmp_path / "last.ckpt")
    answers = example.answer(tmp_path / "last.ckpt")
    told = capsys.readouterr().out
    assert len(answers) == 8 and told.count("question  question e") == 8
    assert all(("  stopped " in told) if answer is None else (f"  answer  {answer}" in told) for answer in answers)
