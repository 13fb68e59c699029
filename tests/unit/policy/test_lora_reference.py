"""The reference of a policy with adapters, without a copy: the initial policy, its KL, and teachers beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.lora import (
    RAGGED_PACKED,
    RAGGED_TARGETS,
    adapted,
    base_weights,
    move_adapter,
    named_gradients,
    ragged_logits,
)
from helpers.training import make_module, step, taught_batch
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.policy.lora import LoRA, is_learned
from sdsearch_lightning.policy.lora_folder import CONFIG
from sdsearch_lightning.policy.packing import PackedSequences
from sdsearch_lightning.policy.teachers import BatchStartTeacher, EMATeacher, FrozenTeacher, Teacher

pytest.importorskip("peft")


def test_the_reference_is_the_initial_policy_without_a_copy() -> None:
    module, initial = adapted(kl_coef=0.1), make_module()
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in module.policy.parameters())
    batch = taught_batch(module)
    assert step(module, batch).kl.item() == 0.0, "at the start, exactly"
    move_adapter(module)
    assert step(module, batch).kl.item() > 1e-3
    assert module.reference is not None

    def through(call: Any) -> list[Tensor]:
        from sdsearch_lightning.policy.head import Reading, keep_logits

        with torch.no_grad():
            return call(RAGGED_PACKED, [Reading(RAGGED_TARGETS, keep_logits)]).kept[0]  # type: ignore[no-any-return]

    assert torch.equal(torch.cat(through(module.reference)), ragged_logits(initial.policy)), (
        "after steps, still exactly"
    )
    assert not torch.equal(ragged_logits(module.policy), ragged_logits(initial.policy))
    assert all(w.requires_grad == is_learned(n) for n, w in module.policy.named_parameters())


def test_the_kl_and_its_gradient_are_those_of_a_frozen_copy() -> None:
    module = move_adapter(adapted(kl_coef=0.1))
    batch = taught_batch(module)
    mine = step(module, batch)
    found = named_gradients(module, mine.kl)
    module.reference = make_module().policy
    theirs = step(module, batch)
    assert torch.equal(mine.kl, theirs.kl)
    again = named_gradients(module, theirs.kl)
    assert all(torch.equal(found[name], again[name]) and found[name].abs().max() > 1e-8 for name in found)


def test_what_fails_in_the_reference_leaves_the_policy_as_it_was() -> None:
    module = move_adapter(adapted(kl_coef=0.1))
    before = ragged_logits(module.policy)
    assert module.reference is not None
    with pytest.raises(ConfigError):
        module.reference(PackedSequences.pack([[3] * 300]), [])
    assert torch.equal(ragged_logits(module.policy), before)


def test_going_on_from_an_adapter_the_reference_has_that_one(tmp_path: Path) -> None:
    first = move_adapter(adapted())
    first.save_adapter(tmp_path / "adapter")
    second = adapted(lora=LoRA(adapter=str(tmp_path / "adapter")), kl_coef=0.1)
    assert torch.equal(ragged_logits(second.policy), ragged_logits(first.policy))
    batch = taught_batch(second)
    assert step(second, batch).kl.item() == 0.0
    move_adapter(second, 0.02)
    assert step(second, batch).kl.item() > 1e-4
    second.reference = first.policy
    kl = step(second, batch).kl
    third = move_adapter(adapted(lora=LoRA(adapter=str(tmp_path / "adapter")), kl_coef=0.1), 0.02)
    assert torch.equal(step(third, batch).kl, kl)
    assert {n for n, w in third.policy.named_parameters() if w.requires_grad} == {
        n for n, _ in third.policy.named_parameters() if is_learned(n)
    }
    third.save_adapter(tmp_path / "again")
    names = [json.loads((tmp_path / n / CONFIG).read_text())["r"] for n in ("adapter", "again")]
    assert names == [4, 4]


@pytest.mark.parametrize("kind", [BatchStartTeacher, EMATeacher, FrozenTeacher])
def test_teachers_with_a_copy_work_on_adapters(kind: type[Teacher]) -> None:
    module = move_adapter(adapted(teacher=kind(), kl_coef=0.1))
    base = base_weights(module)
    before = ragged_logits(module.teacher_policy)
    module.teacher.begin_batch(module.policy)
    module.teacher.after_update(module.policy)
    sums = step(module, taught_batch(module))
    assert torch.isfinite(sums.jsd_loss) and sums.jsd_loss > 0
    moved = not torch.equal(ragged_logits(module.teacher_policy), before)
    assert moved == (kind is not FrozenTeacher)
    copied = {n: w for n, w in module.teacher_policy.named_parameters() if "lora_" not in n}  # type: ignore[union-attr]
    assert all(torch.equal(copied[name], base[name]) for name in base), "a copy's base never moves"
    saved = {name for name in module.state_dict() if module.is_saved(name)}
    assert any(name.startswith("teacher_policy.") for name in saved) == (kind is EMATeacher)
    assert all(map(is_learned, saved))
