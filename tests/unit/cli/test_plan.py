"""`sdsearch plan` as a user meets it: the table, and every refusal in at most three lines and exit code 2."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from sdsearch_lightning.__main__ import main

SMALL = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 512,
}
DATA = ("--data", "SearchDataModule")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    return tmp_path


def plan(*arguments: Any, code: int = 0) -> None:
    assert main(["plan", *DATA, *map(str, arguments)]) == code


def refusal(capsys: pytest.CaptureFixture[str], *arguments: Any) -> list[str]:
    plan(*arguments, code=2)
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Seed set")]
    assert 1 <= len(lines) <= 3 and lines[0].startswith("error: ")
    return lines


def test_the_table_has_parts_and_their_sum(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan("--model.model_name_or_path", small, "--gpu_memory_gib", 40)
    told = capsys.readouterr().out
    for name in ("weights", "reference copy", "optimizer state", "gradients", "activations", "keys and values", "sum"):
        assert f"\n{name}" in told
    assert "one GPU: 40.0 GiB" in told and "assumed" in told and max(map(len, told.splitlines()[1:])) <= 110


def test_on_the_cpu_memory_is_that_of_the_machine(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan("--model.model_name_or_path", small, "--trainer.accelerator", "cpu")
    told = capsys.readouterr().out
    assert "GPU" not in told and "1 process," in told and "GiB per process" in told
    assert f"this machine: {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB" in told


def test_what_cannot_fit_is_refused_with_its_largest_parts(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = refusal(capsys, "--model.model_name_or_path", "Qwen/Qwen2.5-7B", "--gpu_memory_gib", 80)
    assert len(lines) == 3 and "expected at most 80.0 GiB per GPU" in lines[0]
    assert lines[1].startswith("Largest parts: activations")
    assert "gradient_checkpointing" in lines[2] and "model.lora" in lines[2] and "fsdp2" in lines[2]


def test_another_shape_stands_in_for_the_model(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given in (small, small / "config.json"):
        plan("--model.model_name_or_path", "no/such-model", "--model_config", given)
        assert f"shape from {given}" in capsys.readouterr().out
    name = ("--model.model_name_or_path", "no/such-model")
    assert "found none at" in refusal(capsys, *name, "--model_config", small / "nothing")[0]
    (small / "config.json").write_text("{}")
    assert "with a model_type" in refusal(capsys, *name, "--model_config", small)[0]


def test_a_name_that_nobody_knows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def no_network(name: str, **options: Any) -> None:
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(AutoConfig, "from_pretrained", no_network)
    (line,) = refusal(capsys, "--model.model_name_or_path", "no/such-model")
    assert "'no/such-model'" in line and "--model_config" in line
    (line,) = refusal(capsys, "--model.scratch.model_type", "llama")
    assert line.startswith("error: model.scratch") and "--model_config" in line


def test_keys_are_those_of_fit(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = refusal(capsys, "--model.model_name_or_path", small, "--model.kl_coeff", 0)
    assert "model.kl_coef" in line
    (line,) = refusal(capsys, "--model.model_name_or_path", small, "--trainer.strategy", "deepspeed")
    assert "ddp and fsdp2" in line
    (line,) = refusal(capsys, "--gpu_memory_gib", "much")
    assert "--gpu_memory_gib" in line and "'much'" in line


def test_disk_is_told_in_two_lines(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = ("--rollout.max_tokens", 1000, "--rollout.group_size", 5, "--data.batch_size", 20)
    keep = ("--run.checkpoint_keep", 3, "--run.checkpoint_keep_every", 50)
    plan("--model.model_name_or_path", small, *limits, *keep, "--trainer.max_steps", 200)
    checkpoints, rollouts = [line for line in capsys.readouterr().out.splitlines() if line.startswith("disk:")]
    weights = 2 * 512 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    size = f"{weights * 4 * 3 / 1e9:.3g}"  # AdamW's two moments in float32
    assert checkpoints == f"disk: checkpoints 8 x {size} GB (run.checkpoint_keep), one more with best.ckpt"
    assert rollouts == "disk: rollouts up to 0.003 GB a step, 0.24 GB packed for all 200 (docs/running.md)"
    plan("--model.model_name_or_path", small, *limits)
    assert "packed" not in capsys.readouterr().out
