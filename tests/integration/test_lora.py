"""LoRA from end to end: a run, its checkpoints, its resumption, and what other programs load of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers.exports import EXPORT_TOKENS, export, exported_logits, shard, stored
from helpers.fits import Record, ToyData, fit, taught, without_clocks
from helpers.models import tiny_model
from helpers.training import make_module
from helpers.training_rollouts import TRAINING_TOKENIZER
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.module import SDSearchModule
from sdsearch_lightning.policy.loading import ScratchModel
from sdsearch_lightning.policy.lora import LoRA, is_learned
from sdsearch_lightning.policy.teachers import EMATeacher
from sdsearch_lightning.supervised import SupervisedModule
from sdsearch_lightning.training.options import Compute

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


def adapted(model: Any = None, **options: Any) -> Any:
    defaults = {"lora": LoRA(r=4), "kl_coef": 0.3, "optimizer": lambda params: torch.optim.AdamW(params, lr=0.01)}
    return make_module(model, **defaults | options)


def train(module: Any, folder: Path, **options: Any) -> Record:
    record = Record()
    checkpoints = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
    fit(module, *taught(), checkpoints, record, max_steps=4, enable_checkpointing=True, **options)
    return record


def weights(module: Any) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in module.state_dict().items()}


# Training and resuming


@pytest.mark.parametrize(
    "options",
    [
        dict,
        lambda: {"num_updates": 2, "teacher": EMATeacher(0.2), "compute": Compute(gradient_checkpointing=True)},
        lambda: {"lora": LoRA(r=2, target_modules=["q_proj", "lm_head"])},
    ],
    ids=["defaults", "average", "head"],
)
def test_a_resumed_run_equals_one_that_was_not_stopped_bit_for_bit(tmp_path: Path, options: Callable[[], Any]) -> None:
    whole, again = adapted(**options()), adapted(**options())
    uninterrupted = train(whole, tmp_path / "whole")
    saved = stored(tmp_path / "whole/step=2.ckpt")
    assert all(map(is_learned, saved["state_dict"])) and saved["state_dict"]
    resumed = train(again, tmp_path / "whole", ckpt_path=tmp_path / "whole/step=2.ckpt")
    assert without_clocks(resumed.metrics) == without_clocks(uninterrupted.metrics[2:])
    assert min(metrics["train/kl"] for metrics in resumed.metrics) > 0
    mine, theirs = weights(again), weights(whole)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    halfway = saved["state_dict"]
    assert any(not torch.equal(mine[name], halfway[name]) for name in halfway), "the comparison can fail"


def test_training_moves_the_adapter_and_nothing_else_and_begins_without_a_kl(tmp_path: Path) -> None:
    module = adapted()
    before = weights(module)
    record = train(module, tmp_path)
    after = weights(module)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if is_learned(name)}
    assert record.metrics[0]["train/kl"] == 0.0 and record.metrics[1]["train/kl"] > 0


def test_a_base_in_bfloat16_has_an_adapter_in_float32(tmp_path: Path) -> None:
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "base")
    TRAINING_TOKENIZER.save_pretrained(tmp_path / "base")
    kind = {"model_name_or_path": str(tmp_path / "base"), "protocol": make_module().protocol, "lora": LoRA(r=4)}
    module = SDSearchModule(**kind, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-6), kl_coef=0.1)
    module.configure_model()
    start = {name: weight for name, weight in weights(module).items() if is_learned(name)}
    module = SDSearchModule(**kind, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-6), kl_coef=0.1)
    record = Record()
    fit(module, *taught(), record, precision="bf16-true")
    dtypes = {is_learned(name): weight.dtype for name, weight in module.policy.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    after = weights(module)
    moved = [name for name, weight in start.items() if "lora_A" in name and not torch.equal(after[name], weight)]
    assert record.metrics[0]["train/kl"] == 0.0 and record.metrics[0]["train/grad_norm"] > 0
    assert moved, "not even the decay of a first step is lost, in which B is 0 and A has no gradient"


def test_a_checkpoint_of_another_base_is_refused(tmp_path: Path) -> None:
    train(adapted(), tmp_path)
    with pytest.raises(ConfigError, match="ckpt_path: this adapter was trained on another base, scratch llama"):
        train(adapted(tiny_model(seed=1)), tmp_path / "other", ckpt_path=tmp_path / "step=2.ckpt")
    with pytest.raises(ConfigError, match=r"does not fit the model scratch llama: it has no policy\."):
        train(adapted(lora=None), tmp_path / "other", ckpt_path=tmp_path / "step=2.ckpt")
    with pytest.raises(ConfigError, match=r"is \[4, 16\] there and \[8, 16\] here"):
        train(adapted(lora=LoRA(r=8)), tmp_path / "other", ckpt_path=tmp_path / "step=2.ckpt")


def test_a_cold_start_with_an_adapter_goes_on_in_reinforcement_learning(tmp_path: Path) -> None:
    first = SupervisedModule(scratch=ScratchModel(), lora=LoRA(r=4))
    first.protocol = make_module().protocol
    first.attach(tiny_model(), TRAINING_TOKENIZER)
    fit(first, data=ToyData(), max_steps=3)
    first.save_adapter(tmp_path / "adapter")
    second = adapted(lora=LoRA(adapter=str(tmp_path / "adapter")))
    mine, theirs = (dict(m.policy.named_parameters()) for m in (first, second))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    record = train(second, tmp_path / "run")
    assert record.metrics[0]["train/kl"] == 0.0 and record.metrics[1]["train/kl"] > 0


# What other programs load


def test_merged_and_adapter_folders_give_the_policys_logits(tmp_path: Path) -> None:
    from peft import PeftModel

    base = tiny_model(dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    module = adapted(tiny_model(dtype=torch.float32))
    train(module, tmp_path / "run")
    module.save_pretrained(tmp_path / "merged")
    module.save_adapter(tmp_path / "adapter")
    with torch.no_grad():
        expected = module.policy.model(EXPORT_TOKENS).logits
        initial = base(EXPORT_TOKENS).logits
        assert not torch.allclose(expected, initial, atol=1e-2), "training changed what is compared"
        torch.testing.assert_close(exported_logits(tmp_path / "merged"), expected, rtol=0, atol=1e-5)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        on_base = PeftModel.from_pretrained(loaded, str(tmp_path / "adapter"))
        assert torch.equal(on_base(EXPORT_TOKENS).logits, expected), "the same sums in the same order"
        perturbed = load_file(tmp_path / "merged/model.safetensors")
        perturbed["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-2
        base.load_state_dict(perturbed)
        assert not torch.allclose(base(EXPORT_TOKENS).logits, expected, rtol=0, atol=1e-5)


# The command line


@pytest.fixture(scope="module")
def run(workplace: Any) -> Path:
    """runs/lora: as runs/rl, with adapters of rank 4."""
    arguments = (
        "fit",
        "--config",
        "fit.yaml",
        "--run.name",
        "lora",
        "--model.lora.r",
        "4",
        "--model.lora.lora_alpha",
        "64",
    )
    done = workplace.sdsearch(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return workplace.run("lora")  # type: ignore[no-any-return]


def test_a_run_leaves_a_plain_model_and_small_checkpoints(workplace: Any, run: Path) -> None:
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["lora"]["r"] == 4
    saved = stored(run / "checkpoints/last.ckpt")
    assert all(map(is_learned, saved["state_dict"]))
    assert saved["origin"]["name"] == "runs/cold/model" and len(saved["origin"]["base"]) == 16
    assert not (run / "model/adapter_config.json").exists()
    assert not torch.allclose(
        exported_logits(run / "model"), exported_logits(workplace.run("cold") / "model"), atol=1e-3
    )
    assert json.loads((run / "summary.json").read_text())["exact_match"]["after"] is not None
    name = ("--run.name", "lora", "--model.lora.r", "4", "--model.lora.lora_alpha", "64")
    assert workplace.sdsearch("validate", "--config", "fit.yaml", *name, "--ckpt_path", "last").returncode == 0
    (row,) = workplace.metrics("lora/validate/step_00000008")
    last = workplace.metrics("lora")[-1]
    assert {k: v for k, v in row.items() if k.startswith("val/")} == {k: last[k] for k in row if k.startswith("val/")}


@pytest.mark.parametrize("kind", ["file", "shards"])
def test_export_writes_the_merged_model_and_the_adapter(workplace: Any, run: Path, tmp_path: Path, kind: str) -> None:
    from peft import PeftModel

    checkpoint = run / "checkpoints/last.ckpt"
    if kind == "shards":
        shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
        shard(stored(checkpoint), tmp_path / "run/checkpoints/last.ckpt")
        checkpoint = tmp_path / "run/checkpoints/last.ckpt"
    for output, more in (("merged", ()), ("adapter", ("--adapter", "true"))):
        done = export(workplace, checkpoint, tmp_path / output, *more)
        assert (done.returncode, done.stderr) == (0, "")
    assert torch.equal(exported_logits(tmp_path / "merged"), exported_logits(run / "model"))
    base = AutoModelForCausalLM.from_pretrained(workplace.run("cold") / "model", dtype=torch.float32)
    with torch.no_grad():
        on_base = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))(EXPORT_TOKENS).logits
    torch.testing.assert_close(on_base, exported_logits(run / "model"), rtol=0, atol=1e-5)
    assert (
        json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
        == "runs/cold/model"
    )


def test_an_exported_adapter_is_gone_on_from_on_its_base_only(workplace: Any, run: Path, tmp_path: Path) -> None:
    assert export(workplace, run / "checkpoints/last.ckpt", tmp_path / "adapter", "--adapter", "true").returncode == 0
    going_on = (
        "--model.lora.adapter",
        str(tmp_path / "adapter"),
        "--trainer.max_steps",
        "1",
        "--run.overwrite",
        "true",
    )
    more = ("fit", "--config", "fit.yaml", "--run.name", "lora_more", "--jsd.warmup_steps", "0", *going_on)
    done = workplace.sdsearch(*more)
    assert (done.returncode, done.stderr) == (0, "")
    (first, *_) = [row for row in workplace.metrics("lora_more") if row["train/kl"]]
    assert float(first["train/kl"]) == 0.0
    before = next(row["val/exact_match"] for row in workplace.metrics("lora_more"))
    assert before == workplace.metrics("lora")[-1]["val/exact_match"]
    done = workplace.sdsearch(*more, "--model.model_name_or_path", "runs/rl/model")
    assert done.returncode == 2 and "trained on another base, runs/cold/model (fingerprint" in done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_an_exported_adapter_answers_on_its_base(workplace: Any, run: Path, tmp_path: Path) -> None:
    assert export(workplace, run / "checkpoints/last.ckpt", tmp_path / "adapter", "--adapter", "true").returncode == 0
    asked = ("ask", "question e1 the rel1 ?", "--json", "--rollout.max_searches", "1")
    merged, adapter = (
        workplace.sdsearch(*asked, *origin) for origin in (("--run", "lora"), ("--model", str(tmp_path / "adapter")))
    )
    assert (adapter.returncode, adapter.stderr) == (0, "")
    assert json.loads(adapter.stdout) == json.loads(merged.stdout)
    done = workplace.sdsearch(
        *asked, "--model", str(tmp_path / "adapter"), "--model.model_name_or_path", "runs/rl/model"
    )
    assert done.returncode == 2 and "trained on another base, runs/cold/model (fingerprint" in done.stderr


def test_without_an_adapter_there_is_none_to_export(workplace: Any, tmp_path: Path) -> None:
    done = export(workplace, "runs/rl/checkpoints/last.ckpt", tmp_path / "model", "--adapter", "true")
    assert done.returncode == 2 and "it has no adapter. Leave --adapter out." in done.stderr
    assert not (tmp_path / "model").exists()


def test_an_adapter_checkpoint_on_a_base_that_has_changed_is_refused(workplace: Any, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["model_name_or_path"] = "runs/rl/model"
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config))
    done = export(workplace, tmp_path / "run/checkpoints/last.ckpt", tmp_path / "model")
    assert done.returncode == 2 and "this adapter was trained on another base, runs/cold/model" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model.lora.r", "0"], "expected r of at least 1"),
        (["--model.lora.rr", "3"], "model.lora: unknown key 'rr'."),
        (["--model.lora.lora_alfa", "3"], "Did you mean 'lora_alpha'?"),
        (["--model.lora.target_modules", "query"], "model.lora.target_modules: "),
        (["--model.lora.adapter", "nowhere"], "expected a folder of a peft adapter"),
    ],
)
def test_usage_errors_are_lines(workplace: Any, arguments: list[str], told: str) -> None:
    done = workplace.sdsearch("fit", "--config", "fit.yaml", "--run.name", "lora_wrong", *arguments)
    assert done.returncode == 2 and told in done.stderr and len(done.stderr.splitlines()) <= 3, done.stderr
