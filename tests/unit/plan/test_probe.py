"""What the probes find, against numbers by hand and against the tensors of a real training step on the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import plan_accuracy
from sdsearch_lightning.cli.commands import quieten
from sdsearch_lightning.cli.plan import PlanCLI
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.plan import memory, probe
from sdsearch_lightning.plan.architecture import find_architecture
from sdsearch_lightning.plan.live_bytes import LiveBytes
from sdsearch_lightning.plan.memory import GIB, Settings, plan_parts
from sdsearch_lightning.plan.probe import Adapters, Precision, Shape, adapt, count_model, probe_optimizer
from sdsearch_lightning.plan.settings import adapters_of, num_devices, precision_of, settings_of
from sdsearch_lightning.policy import head

SMALL = {
    "model_type": "qwen2",
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 384,
    "vocab_size": 1024,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}
KEYS = ["--rollout.max_tokens", "384", "--rollout.group_size", "4", "--model.max_micro_batch_tokens", "1536"]


@pytest.fixture
def small(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    return str(tmp_path)


def planned(folder: str, *keys: str) -> tuple[PlanCLI, Any, Settings]:
    quieten()
    cli = PlanCLI(["fit", "--data", "SearchDataModule", "--model.model_name_or_path", folder, *KEYS, *keys])
    make, _ = find_architecture(folder, None)
    return cli, make, settings_of(cli.options, cli.made, make, 80 * GIB)


# Against a real step


@pytest.mark.parametrize(
    "keys",
    [
        ["--trainer.precision", "bf16-mixed"],
        ["--trainer.precision", "bf16-mixed", "--model.compute.gradient_checkpointing", "true"],
        ["--model.kl_coef", "0", "--model.teacher", "EMATeacher"],
        ["--model.compute.layout", "packed", "--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1"],
    ],
    ids=["mixed", "checkpoints", "teacher", "sgd"],
)
def test_the_plan_is_the_sum_of_the_tensors_of_a_step(
    small: str, keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Real models have a hundred times the vocabulary: fewer rows fill a pass of the output layer.
    for module in (head, memory):
        monkeypatch.setattr(module, "MAX_LOGITS", 2**18)
        monkeypatch.setattr(module, "CHUNK_LOGITS", 2**16)
    monkeypatch.setattr(head, "CPU_CHUNK_LOGITS", 2**16)
    monkeypatch.setattr(probe, "SHARED_PROMPT", 64)  # of rollouts that are ten times as long
    monkeypatch.setattr(plan_accuracy, "PROMPT", 64)
    cli, make, settings = planned(small, *keys)
    found = plan_accuracy.measure(cli, make, nullcontext())
    for moment, kinds in found.items():
        ours = plan_accuracy.planned(plan_parts(settings), moment)
        assert ours["weights"] == pytest.approx(kinds["Parameter"], rel=0.01)
        assert ours["gradients"] == pytest.approx(kinds["Gradient"], rel=0.01)
        if moment == "step":  # temporaries of the step count as optimizer here
            state = ours["optimizer state"] + ours["activations and work"]
            assert state == pytest.approx(kinds["Optstate"], rel=0.01, abs=100_000)
            continue
        work = kinds["Total"] - kinds["Parameter"] - kinds["Gradient"] - kinds["Optstate"]
        assert ours["activations and work"] == pytest.approx(work, rel=0.15)
        half = replace(settings, model=replace(settings.model, num_layers=3))
        wrong = plan_accuracy.planned(plan_parts(half), moment)
        assert settings.checkpoints or wrong["activations and work"] != pytest.approx(work, rel=0.15)


def test_half_a_model_is_outside_of_the_band(small: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(SMALL | {"num_hidden_layers": 3}))
    whole, half = (planned(folder)[2] for folder in (small, str(other)))
    assert half.model.weight_bytes != pytest.approx(whole.model.weight_bytes, rel=0.15)
    assert half.passes.layer_kept == pytest.approx(whole.passes.layer_kept, rel=0.01), "one layer keeps what it kept"


# The probes


def test_live_bytes_counts_storage_once_and_forgets_it() -> None:
    outside = torch.zeros(10)
    with LiveBytes() as live:
        a = torch.zeros(100)
        view, other = a[10:], outside.add_(1)
        assert live.now == 400
        b = a + 1
        assert live.now == 800
        del b
        assert (live.now, live.peak) == (400, 800)
        del a
        assert live.now == 400, "a view keeps it"
        del view, other
        assert live.now == 0


def test_counts_of_the_public_architectures() -> None:
    for name, numbers, embeddings in (("Qwen2.5-3B", 3_085_938_688, 1), ("Qwen2.5-7B", 7_615_616_512, 2)):
        make, source = find_architecture(f"Qwen/{name}", None)
        counts = count_model(make, None, torch.float32)
        assert source == f"architectures/{name}.json" and counts.num_parameters == numbers == counts.num_trained
        assert counts.root == pytest.approx(embeddings * counts.head, rel=1e-4)
        assert counts.num_layers * counts.layer + counts.root == numbers
        assert find_architecture(f"Qwen/{name}-Instruct", None)[1] == source


def test_adapters_stand_beside_every_linear_layer(small: str) -> None:
    make, _ = find_architecture(small, None)
    plain, adapted = (count_model(make, a, torch.bfloat16) for a in (None, Adapters(8, None)))
    widths = [(128, 128), (128, 64), (128, 64), (128, 128), (128, 384), (128, 384), (384, 128)]
    assert adapted.num_trained == 6 * 8 * sum(a + b for a, b in widths)
    assert adapted.num_parameters == plain.num_parameters + adapted.num_trained
    assert adapted.trained_bytes == 4 * adapted.num_trained and adapted.head_trained == 0
    assert adapted.weight_bytes == 2 * plain.num_parameters + 4 * adapted.num_trained
    two = count_model(make, Adapters(8, ["q_proj", "v_proj"]), torch.bfloat16)
    assert two.num_trained == 6 * 8 * (256 + 192)
    with pytest.raises(ConfigError, match="names of linear layers"):
        adapt(make(torch.float32), Adapters(8, ["nothing"]))


@pytest.mark.filterwarnings("ignore")  # peft's, of transformers
def test_adapters_take_what_those_of_peft_take(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")

    def adapt_by_peft(model: Any, adapters: Adapters) -> Any:
        config = peft.LoraConfig(r=adapters.rank, target_modules="all-linear", task_type="CAUSAL_LM")
        return peft.get_peft_model(model, config).base_model.model

    make, _ = find_architecture(small, None)
    shape, half = Shape("shared_prefix", 384, 4, 1536, 512), torch.bfloat16
    monkeypatch.setattr(probe, "FakeTensorMode", lambda **_: nullcontext())  # peft moves weights, which fakes cannot
    found = []
    for rank, way in ((8, adapt), (8, adapt_by_peft), (64, adapt_by_peft)):
        monkeypatch.setattr(probe, "adapt", way)
        found.append(probe.probe_passes(make, Adapters(rank, None), Precision(half, half), shape))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("make", "state", "work"),
    [
        (lambda p: torch.optim.AdamW(p), 2.0, 1.0),
        (lambda p: torch.optim.AdamW(p, fused=True), 2.0, 0.0),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), 3.0, 1.0),
        (lambda p: torch.optim.SGD(p, lr=0.1), 0.0, 0.0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1.0, 0.0),
    ],
)
def test_what_an_optimizer_keeps_is_found_by_trying(make: Callable[..., Any], state: float, work: float) -> None:
    found = probe_optimizer(make, torch.float32)
    assert (found.state, found.work) == pytest.approx((state, work), abs=0.01)
    # Per byte of bfloat16: all of it in float32, and a master and its gradient besides.
    found = probe_optimizer(make, torch.bfloat16)
    assert (found.state, found.work) == pytest.approx((2 * state + 2, 2 * work + 2), abs=0.01)


def test_the_largest_micro_batch_is_never_smaller_than_a_group() -> None:
    assert Shape("packed", 100, 5, 1000, 0).lengths == [100] * 10
    assert Shape("packed", 100, 5, 350, 0).lengths == [100] * 5
    assert Shape("packed", 100, 5, 1040, 0).lengths == [100] * 10 + [40]


# Settings


def test_names_of_precisions_and_devices() -> None:
    half = torch.bfloat16
    names = {None: (None, False), "32": (None, False), "bf16-mixed": (half, True), "bf16": (half, True)}
    names |= {"bf16-true": (half, False), "16-mixed": (torch.float16, True), 16: (torch.float16, True)}
    for name, expected in names.items():
        assert precision_of(name) == expected
    with pytest.raises(ConfigError, match="transformer-engine"):
        precision_of("transformer-engine")
    assert [num_devices(x) for x in (3, "4", [0, 2], "0,1,5")] == [3, 4, 2, 3]
    assert adapters_of(None, half) is None
    assert adapters_of({"r": 8, "target_modules": "all-linear"}, half) == Adapters(8, None, half)
    assert adapters_of({"r": 8, "target_modules": ["q_proj"]}, half) == Adapters(8, ["q_proj"], half)


def test_settings_come_from_the_keys_of_fit(small: str) -> None:
    mixed = planned(small, "--trainer.precision", "bf16-mixed", "--model.teacher", "EMATeacher")[2]
    assert (mixed.copies, mixed.compute_bytes) == (["reference", "teacher"], 2)
    assert (mixed.head_bytes, mixed.casts_head) == (4, False)
    narrow = planned(small, "--trainer.precision", "bf16-mixed", "--model.compute.wide_head", "false")[2]
    assert (narrow.head_bytes, narrow.casts_head) == (2, True)
    assert mixed.model.weight_bytes == 4 * mixed.model.num_parameters
    true = planned(small, "--trainer.precision", "bf16-true", "--model.kl_coef", "0")[2]
    assert (true.copies, true.compute_bytes, true.head_bytes, true.casts_head) == ([], 2, 2, False)
    assert true.model.weight_bytes == 2 * true.model.num_parameters
    keys = ["--trainer.precision", "bf16-mixed", "--trainer.devices", "4", "--trainer.num_nodes", "2"]
    sharded = planned(small, *keys, "--trainer.strategy", "fsdp2")[2]
    assert (sharded.parallel, sharded.shards, sharded.head_bytes, sharded.casts_head) == ("fsdp2", 8, 2, False)
    assert sharded.model.weight_bytes == mixed.model.weight_bytes
    assert planned(small, *keys)[2].parallel == "ddp"
    with pytest.raises(ConfigError, match="deepspeed"):
        planned(small, "--trainer.strategy", "deepspeed")


def test_slots_are_those_of_the_engine(small: str) -> None:
    settings = planned(small, "--rollout.engine", "SlotEngine", "--rollout.engine.kv_cache_gib", "0.02")[2]
    row = 2 * 6 * 2 * 32 * 4 * 384  # keys and values, layers, heads, width, float32, tokens
    assert settings.passes.kv_row == row and settings.num_slots == int(0.02 * GIB / row)
    assert planned(small, "--data.batch_size", "2")[2].num_slots == 8, "never more than rollouts"
    with pytest.raises(ConfigError, match="kv_cache_gib is 0.001"):
        planned(small, "--rollout.engine", "SlotEngine", "--rollout.engine.kv_cache_gib", "0.001")
