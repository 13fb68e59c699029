"""Whole training steps under a real Trainer: callbacks, rollouts, losses, updates, checkpoints and resumption."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from helpers.closed_form import closed_form
from helpers.fits import Broken, DrawnScripts, Record, ToyData, fit, grouping, taught, without_clocks
from helpers.models import tiny_model
from helpers.training import gradient, make_module, weights_of
from helpers.training_rollouts import ONE, TRAINING_CODEC, TRAINING_PROTOCOL, TRAINING_TOKENIZER, TWO
from sdsearch_lightning.callbacks import JSDWeightScheduler
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.losses.divergences import JensenShannon
from sdsearch_lightning.module import SDSearchModule
from sdsearch_lightning.rollout import GenerateEngine
from sdsearch_lightning.schedules import Linear
from sdsearch_lightning.step.collate import SearchBatch
from sdsearch_lightning.step.teacher_rows import TeacherRows

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),  # a resumed run
    pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode"),  # the reference
]


def plain(rate: float = 0.1) -> Any:
    return lambda params: torch.optim.SGD(params, lr=rate)


def sgd_module(model: Any = None, **options: Any) -> SDSearchModule:
    """Plain gradient descent without clipping: a step shows its gradient."""
    return make_module(model, **{"optimizer": plain(), "gradient_clip_val": None} | options)


def run(module: SDSearchModule, callbacks: Sequence[Any], **options: Any) -> Record:
    record = Record()
    fit(module, *callbacks, record, **options)
    return record


# The step as a whole


def test_an_update_by_hand() -> None:
    """Two updates of one batch of rollouts; the second one is off policy."""
    options: dict[str, Any] = {"divergence": JensenShannon(top_k=None), "kl_coef": 0.2, "num_updates": 2}
    module, mirror = (sgd_module(tiny_model("gpt2"), **options) for _ in range(2))  # float64 throughout
    record = run(module, taught(0.5, rule="sqrt"), data=ToyData(batch_size=4))
    batch = record.batches[0]
    values = []
    for update in range(2):
        share = slice(2 * update, 2 * update + 2)
        blocks = batch.hindsight[share]
        weights, texts = zip(*((b.weight, b.text.strip()) if b else (0.0, "") for b in blocks), strict=True)
        policy_loss, jsd, kl = closed_form(mirror, batch.groups[share], weights, texts, on_policy=update == 0)
        loss = policy_loss + 0.5 * jsd + 0.2 * kl
        pull = gradient(mirror, loss)
        values.append([value.item() for value in (loss, policy_loss, jsd, kl)])
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(weights_of(mirror) - 0.1 * pull, mirror.policy.parameters())
    assert all(abs(value) > 1e-6 for value in values[1]), "all three terms are at work"
    torch.testing.assert_close(weights_of(module), weights_of(mirror), rtol=0, atol=1e-10)
    logged = [record.metrics[0][name] for name in ("train/loss", "train/policy_loss", "distill/loss", "train/kl")]
    assert logged == pytest.approx([(a + b) / 2 for a, b in zip(*values, strict=True)], rel=1e-5, abs=1e-8)


def test_micro_batches_change_nothing() -> None:
    ends: list[Tensor] = []
    for max_tokens in (1, 400, 100_000):
        module = sgd_module(kl_coef=0.2, max_micro_batch_tokens=max_tokens, gradient_clip_val=0.5)
        run(module, taught(), max_steps=2, data=ToyData(batch_size=5))
        ends.append(weights_of(module))
    assert (ends[0] - weights_of(sgd_module())).abs().max() > 1e-3
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-10)


def test_the_verdicts_are_written_where_there_was_a_teacher() -> None:
    batch = run(sgd_module(), taught(rule="mixed"), data=ToyData(batch_size=6)).batches[0]
    blocks = [block is not None for block in batch.hindsight]
    assert any(blocks) and not all(blocks)
    for group, block, credits in zip(batch.groups, batch.hindsight, batch.credit, strict=True):
        for trajectory, credit in zip(group.trajectories, credits, strict=True):
            assert (credit is not None) == (block is not None and bool(trajectory.queries))
            for verdict in credit or ():
                text = TRAINING_CODEC.decode(trajectory.spans[verdict.span].token_ids)
                assert text in trajectory.queries and len(verdict.jsd) == len(text.split())


# Weight and warm-up


class Counting(SDSearchModule):
    """Counts what the teacher is asked."""

    calls = 0

    def teacher_step(self, batch: SearchBatch) -> TeacherRows:
        self.calls += 1
        return super().teacher_step(batch)


def counting() -> Counting:
    module = Counting("unused", protocol=TRAINING_PROTOCOL, optimizer=plain())
    module.attach(tiny_model(dtype=torch.float32), TRAINING_TOKENIZER)
    return module


def test_weight_0_is_grpo_to_the_last_bit() -> None:
    modules = [counting() for _ in range(3)]
    run(modules[0], [grouping()], max_steps=2)
    run(modules[1], taught(0.0), max_steps=2)
    run(modules[2], taught(0.5), max_steps=2)
    assert torch.equal(weights_of(modules[0]), weights_of(modules[1]))
    assert not torch.equal(weights_of(modules[0]), weights_of(modules[2]))
    assert not torch.equal(weights_of(modules[0]), weights_of(counting())), "GRPO alone learns"
    assert [module.calls for module in modules] == [0, 0, 2]


def test_the_teacher_rests_until_the_warm_up_ends() -> None:
    module = counting()
    calls: list[int] = []

    class Watch(Record):
        def on_train_batch_end(self, *args: Any) -> None:
            calls.append(module.calls)

    record = Record()
    fit(module, *taught(0.5, warmup_steps=2), Watch(), record, max_steps=4)
    assert calls == [0, 0, 1, 2], "step 2 is the first"
    assert [m["distill/weight"] for m in record.metrics] == [0, 0, 0.5, 0.5]
    assert [bool(m["distill/teacher_rows"]) for m in record.metrics] == [False, False, True, True]
    assert all(credit is None for batch in record.batches[:2] for row in batch.credit for credit in row)


def test_a_weight_without_blocks_is_a_mistake() -> None:
    with (
        pytest.warns(UserWarning, match="no HindsightConstruction is among the trainer's callbacks"),
        pytest.raises(RuntimeError, match=r"StepBatch.hindsight, which is None: HindsightConstruction has to fill it"),
    ):
        run(counting(), [grouping(), JSDWeightScheduler(0.5, 0)])


# Weights that move, and those that sampled


@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float32])
def test_a_step_at_1e_6_moves_the_weights(tmp_path: Path, saved: torch.dtype) -> None:
    tiny_model(dtype=saved).save_pretrained(tmp_path)
    TRAINING_TOKENIZER.save_pretrained(tmp_path)
    module = SDSearchModule(str(tmp_path), protocol=TRAINING_PROTOCOL)  # AdamW at 1e-6, as ever
    module.configure_model()
    start = weights_of(module)
    run(module, taught())
    assert start.dtype == weights_of(module).dtype == torch.float32
    moved = (weights_of(module) - start).abs()
    assert (moved > 0).float().mean() > 0.5 and moved.max() < 3e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-6)])
@pytest.mark.parametrize(
    ("family", "rates"),
    [("gpt2", {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}), ("llama", {"attention_dropout": 0.5})],
)
def test_the_first_update_is_on_policy(
    family: str, rates: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    """The real engine; dropout or another arithmetic in either place would show in the gap."""
    module = sgd_module(tiny_model(family, dtype, **rates).train(), temperature=0.8)
    engine = grouping(GenerateEngine(), max_turn_tokens=12, temperature=0.8)
    record = run(module, [engine], max_steps=2)
    assert module.policy.training
    for metrics in record.metrics:
        assert metrics["train/policy_tokens"] > 50
        assert metrics["train/clip_fraction"] == 0
        assert metrics["train/logprob_gap"] < tolerance


def test_a_policy_loss_is_minus_the_advantage_on_policy() -> None:
    record = run(sgd_module(), [grouping()])
    judged = [t for group in record.batches[0].groups for t in group.trajectories]
    tokens = [(t.advantage, sum(t.policy_mask)) for t in judged]
    mean = sum(advantage * count for advantage, count in tokens) / sum(count for _, count in tokens)
    assert record.metrics[0]["train/policy_loss"] == pytest.approx(-mean, rel=1e-6) != 0


def test_gradients_are_clipped_to_the_norm_and_logged_before() -> None:
    free, clipped = sgd_module(), sgd_module(gradient_clip_val=0.01)
    start = weights_of(free)
    norms = [run(module, taught()).metrics[0]["train/grad_norm"] for module in (free, clipped)]
    assert norms[0] == norms[1] > 0.1
    moved, barely = weights_of(free) - start, weights_of(clipped) - start
    assert moved.norm().item() == pytest.approx(0.1 * norms[0], rel=1e-6)
    torch.testing.assert_close(barely, moved * 0.01 / norms[0], rtol=1e-4, atol=1e-12)


# Counting


def test_a_step_is_a_batch_whatever_the_number_of_updates(tmp_path: Path) -> None:
    module = sgd_module(num_updates=3, lr_schedule=Linear(total_steps=8))
    checkpoints = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    record = Record()
    trainer = fit(module, *taught(), checkpoints, record, max_steps=4, enable_checkpointing=True)
    assert trainer.global_step == len(record.batches) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step=2.ckpt", "step=4.ckpt"]
    assert [m["train/lr"] for m in record.metrics] == pytest.approx([0.1 * (1 - i / 8) for i in range(4)])
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 4


def test_more_updates_than_questions_cannot_work() -> None:
    with pytest.raises(ConfigError, match=r"model.num_updates is 4, but the batch holds 3 questions"):
        run(sgd_module(num_updates=4), taught())


# The reference


def test_a_resumed_run_keeps_its_reference(tmp_path: Path) -> None:
    options: dict[str, Any] = {"kl_coef": 0.3, "optimizer": lambda params: torch.optim.AdamW(params, lr=0.01)}

    def checkpoints() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)

    whole = make_module(**options)
    uninterrupted, resumed = Record(), Record()
    fit(whole, *taught(), checkpoints(), uninterrupted, max_steps=4, enable_checkpointing=True)
    path = tmp_path / "step=2.ckpt"
    saved = torch.load(path, weights_only=False)
    assert saved["state_dict"] and all(name.startswith("policy.") for name in saved["state_dict"])
    again = make_module(**options)
    fit(again, *taught(), checkpoints(), resumed, max_steps=4, enable_checkpointing=True, ckpt_path=path)
    assert without_clocks(resumed.metrics) == without_clocks(uninterrupted.metrics[2:])
    assert min(m["train/kl"] for m in resumed.metrics) > 1e-3
    assert torch.equal(weights_of(again), weights_of(whole))
    assert again.reference is not None
    assert all(
        torch.equal(a, b) for a, b in zip(again.reference.parameters(), make_module().policy.parameters(), strict=True)
    )


def test_without_a_kl_term_there_is_no_reference() -> None:
    record = run(sgd_module(), taught())
    assert record.metrics[0]["train/kl"] == 0


# Nothing to learn from


def test_a_step_without_a_judged_rollout_learns_nothing_and_stays_finite() -> None:
    module = sgd_module(kl_coef=0.3)
    start = weights_of(module)
    callbacks = [grouping(DrawnScripts(ONE, TWO), max_error_fraction=1.0), *taught()[1:]]
    record = run(module, callbacks, data=ToyData(retriever=Broken()), max_steps=2)
    assert record.metrics[0]["rollout/retrieval_error_rate"] == 1
    assert torch.equal(weights_of(module), start)
    for name in ("train/loss", "train/policy_loss", "train/kl", "train/grad_norm", "train/policy_tokens"):
        assert record.metrics[0][name] == 0, name
