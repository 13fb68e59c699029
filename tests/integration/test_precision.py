"""bfloat16 through the command line: what is trained, what is kept, and a resumed run that is the same run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import fits
from helpers.models import tiny_model
from helpers.training_rollouts import TRAINING_PROTOCOL, TRAINING_TOKENIZER
from helpers.workplace import Workplace
from sdsearch_lightning import SDSearchModule
from sdsearch_lightning.callbacks import HindsightConstruction, JSDWeightScheduler, RolloutGrouping
from sdsearch_lightning.policy.loading import ScratchModel

STEPS = 4


def fit(place: Workplace, name: str, precision: str, *more: str) -> Path:
    done = place.sdsearch(
        *("fit", "--config", "fit.yaml", "--run.name", name, "--trainer.precision", precision),
        *("--trainer.max_steps", str(STEPS), "--trainer.val_check_interval", "100", *more),
    )
    assert done.returncode == 0, done.stderr
    return place.run(name)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.bfloat16), ("bf16-mixed", torch.float32)])
def test_a_run_in_bfloat16(workplace: Workplace, precision: str, dtype: torch.dtype) -> None:
    run = fit(workplace, f"in_{precision}", precision)
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    optimizer = checkpoint["optimizer_states"][0]
    assert {value.dtype for value in checkpoint["state_dict"].values()} == {dtype}
    assert optimizer["state"][0]["exp_avg"].dtype == torch.float32
    assert ("master_weights" in optimizer) == (precision == "bf16-true")
    before = load_file(workplace.run("cold") / "model/model.safetensors")
    after = load_file(run / "model/model.safetensors")
    assert any(not torch.equal(after[name], before[name].to(dtype)) for name in before), "nothing was learned"
    gaps = [float(row["train/logprob_gap"]) for row in workplace.metrics(run.name) if row.get("train/logprob_gap")]
    assert len(gaps) == STEPS and max(gaps) < 0.02, "the engine and the training step are the same policy"


def test_a_resumed_run_in_bf16_true_is_the_same_run(workplace: Workplace) -> None:
    whole = fit(workplace, "bf16_whole", "bf16-true")
    done = workplace.interrupted(
        *("SIGKILL", "sdsearch_lightning.callbacks.rollout_grouping:RolloutGrouping.on_train_batch_start", "4"),
        *("before", "fit", "--config", "fit.yaml", "--run.name", "bf16_killed", "--trainer.precision", "bf16-true"),
        *("--trainer.max_steps", str(STEPS), "--trainer.val_check_interval", "100"),
    )
    assert done.returncode == -9
    assert not (workplace.run("bf16_killed") / "summary.json").exists()
    killed = fit(workplace, "bf16_killed", "bf16-true")
    assert workplace.metrics("bf16_killed") == workplace.metrics("bf16_whole")
    mine, theirs = (torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (killed, whole))
    pairs = zip(*(c["optimizer_states"][0]["master_weights"] for c in (mine, theirs)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_only_weights_become_bfloat16() -> None:
    module = SDSearchModule(scratch=ScratchModel(), protocol=TRAINING_PROTOCOL)
    module.attach(tiny_model(dtype=torch.float32), TRAINING_TOKENIZER)
    grouping = RolloutGrouping(group_size=2, top_k=2, max_tokens=160, engine=fits.DrawnScripts())
    fits.fit(module, grouping, HindsightConstruction(), JSDWeightScheduler(0.1, 0), precision="bf16-true")
    assert {weight.dtype for weight in module.policy.parameters()} == {torch.bfloat16}
    rotary = {buffer.dtype for buffer in module.policy.buffers() if buffer.is_floating_point()}
    assert rotary == {torch.float32}, "positions need all their digits"
    assert torch.get_default_dtype() == torch.float32


def test_half_precision_is_refused(workplace: Workplace) -> None:
    done = workplace.sdsearch("fit", "--config", "fit.yaml", "--run.name", "half", "--trainer.precision", "16-true")
    assert done.returncode == 2 and "expected bf16-true or bf16-mixed, found 16-true" in done.stderr
