"""LoRA on two processes: one adapter, one reference, and a checkpoint that is exported as the run saved its model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.exports import export, exported_logits
from helpers.workplace import PROCESSES

pytest.importorskip("peft")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode"),
    pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`"),
    pytest.mark.filterwarnings(
        "ignore:`is_gradient_checkpointing` is deprecated"
    ),  # peft's loading, transformers' name
]


@pytest.mark.distributed
def test_two_processes_train_one_adapter_with_the_reference_in_it(workplace: Any) -> None:
    both = ("--trainer.strategy", "ddp", "--trainer.devices", "2", "--data.batch_size", "2", "--model.lora.r", "4")
    more = ("--model.num_updates", "2", "--trainer.max_steps", "3", "--run.name", "lora_ddp")
    done = workplace.start("-m", "sdsearch_lightning", "fit", "--config", "fit.yaml", *both, *more)
    assert done.returncode == 0, done.stderr
    rows = [row for row in workplace.metrics("lora_ddp") if row["train/kl"]]
    assert float(rows[-1]["train/kl"]) > 0 and float(rows[-1]["train/grad_norm"]) > 0


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sharded_policy_has_the_same_reference_gradients_and_merged_weights(dtype: str) -> None:
    script = PROCESSES / "sharded_adapter.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launch, str(script), dtype], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.mark.distributed
@pytest.mark.parametrize("lora", [(), ("--model.lora.r", "4")], ids=["all weights", "lora"])
def test_the_checkpoint_of_a_sharded_run_is_exported_as_the_run_saved_its_model(
    workplace: Any, tmp_path: Path, lora: tuple[str, ...]
) -> None:
    name = "sharded_lora" if lora else "sharded_all"
    both = ("--trainer.strategy", "fsdp2", "--trainer.devices", "2", "--data.batch_size", "2")
    more = ("--trainer.max_steps", "2", "--run.name", name, *lora)
    done = workplace.start("-m", "sdsearch_lightning", "fit", "--config", "fit.yaml", *both, *more)
    assert done.returncode == 0, done.stderr
    assert (workplace.run(name) / "checkpoints/last.ckpt/.metadata").is_file()
    done = export(workplace, workplace.run(name) / "checkpoints/last.ckpt", tmp_path / "model")
    assert (done.returncode, done.stderr) == (0, "")
    assert torch.equal(exported_logits(tmp_path / "model"), exported_logits(workplace.run(name) / "model"))
    assert not torch.equal(exported_logits(tmp_path / "model"), exported_logits(workplace.run("cold") / "model"))
    assert (tmp_path / "model/README.md").read_text() == (workplace.run(name) / "model/README.md").read_text()
