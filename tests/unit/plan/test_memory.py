"""The arithmetic of `sdsearch plan`, on numbers that are worked out by hand here."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sdsearch_lightning.plan.memory import (
    CHUNK_TENSORS,
    CONTEXT,
    GIB,
    SLACK,
    ModelCounts,
    OptimizerBytes,
    Part,
    PassBytes,
    Settings,
    head_work,
    peak,
    plan_parts,
)

BILLION = 10**9
MODEL = ModelCounts(
    num_parameters=BILLION,
    num_trained=BILLION,
    weight_bytes=4 * BILLION,
    trained_bytes=4 * BILLION,
    num_layers=10,
    layer=90_000_000,
    layer_trained=90_000_000,
    root=100_000_000,
    root_trained=100_000_000,
    head=100_000_000,
    head_trained=100_000_000,
    vocab_size=2**17,
)
PASSES = PassBytes(
    num_tokens=1000,
    layer_kept=500_000_000,
    layer_work=100_000_000,
    layer_input=10_000_000,
    around=30_000_000,
    head_rows=20_000_000,
    reading=200_000_000,
    kv_row=1_000_000,
)
SETTINGS = Settings(
    model=MODEL,
    passes=PASSES,
    optimizer=OptimizerBytes(state=2.0, work=1.0),
    parallel="one",
    num_gpus=1,
    copies=("reference",),
    compute_bytes=2,
    head_bytes=2,
    casts_head=True,
    checkpoints=False,
    num_slots=64,
    engine=0,
)
ADAPTERS = replace(
    MODEL, weight_bytes=2 * BILLION, num_trained=10**7, trained_bytes=4 * 10**7, head_trained=0, root_trained=0
)


def rows(settings: Settings) -> dict[str, Part]:
    return {part.name: part for part in plan_parts(settings)}


def test_states_of_a_full_training() -> None:
    found = rows(SETTINGS)
    expected = {"weights": 4, "reference copy": 4, "optimizer state": 8}
    for name, size in expected.items():
        assert found[name].rollout == found[name].backward == found[name].step == size * BILLION
    gradients = found["gradients"]
    assert (gradients.rollout, gradients.backward, gradients.step) == (0, 4 * BILLION, 4 * BILLION)
    temporary = found["optimizer's work"]
    assert (temporary.rollout, temporary.backward, temporary.step) == (0, 0, 4 * BILLION)
    assert "DDP buckets" not in found and "teacher copy" not in found
    assert "optimizer's work" not in rows(replace(SETTINGS, optimizer=OptimizerBytes(2.0, 0.0)))


def test_fsdp2_divides_all_states_and_gathers_weights() -> None:
    one, eight = rows(SETTINGS), rows(replace(SETTINGS, parallel="fsdp2", num_gpus=8, casts_head=False))
    for name in ("weights", "reference copy", "optimizer state", "gradients"):
        assert eight[name].backward == one[name].backward / 8
    assert eight["gathered weights"].rollout == 2 * BILLION
    # Two layers and what is outside of them, in two bytes, weights and gradients.
    assert eight["gathered layers"].backward == 2 * 2 * (100_000_000 + 2 * 90_000_000)
    assert "gathered weights" not in one and "gathered layers" not in one


def test_ddp_keeps_gradients_twice_unless_buckets_are_views() -> None:
    ddp = rows(replace(SETTINGS, parallel="ddp", num_gpus=8))
    assert ddp["DDP buckets"].rollout == ddp["DDP buckets"].backward == 4 * BILLION
    views = rows(replace(SETTINGS, parallel="ddp_views", num_gpus=8))
    assert "DDP buckets" not in views and views["gradients"].rollout == 4 * BILLION, "buckets stay between steps"
    assert ddp["weights"].backward == 4 * BILLION
    assert ddp["CUDA, assumed"].step == CONTEXT + GIB and rows(SETTINGS)["CUDA, assumed"].step == CONTEXT


def test_adapters_have_the_only_gradients_and_states() -> None:
    found = rows(replace(SETTINGS, model=ADAPTERS, copies=(), casts_head=False))
    assert found["weights"].backward == 2 * BILLION
    assert found["gradients"].backward == 4 * 10**7 and found["optimizer state"].step == 8 * 10**7


def test_activations_with_and_without_recomputation() -> None:
    all_kept, inputs = rows(SETTINGS), rows(replace(SETTINGS, checkpoints=True))
    assert all_kept["activations"].backward == 10 * 500_000_000 + 30_000_000
    assert inputs["activations"].backward == 10 * 10_000_000 + 30_000_000
    # One layer's backward pass, its activations made again, the output layer's gradient; or its rows and theirs.
    layer = 400_000_000 + (500_000_000 - 10_000_000) + 100_000_000
    head = head_work(SETTINGS) + 2 * 20_000_000
    assert inputs["passes"].backward == max(layer, head)
    assert all_kept["passes"].backward == max(layer - 490_000_000, head)


def test_the_output_layer() -> None:
    logits, chunk = 512 * 2**17 * 2, 128 * 2**17 * 4 * CHUNK_TENSORS
    so_far, cast, new = 4 * 10**8, 2 * 10**8, 4 * 10**8 + 2 * 10**8
    assert head_work(SETTINGS) == logits + so_far + cast + max(chunk, new)
    frozen = replace(SETTINGS, model=ADAPTERS, casts_head=False)
    assert head_work(frozen) == logits + chunk
    assert head_work(replace(frozen, head_bytes=4)) == 2 * logits + chunk


def test_rollouts() -> None:
    found = rows(SETTINGS)
    assert found["keys and values"].rollout == 64 * 1_000_000 and found["keys and values"].backward == 0
    sampling = 64 * 2**17 * 26 + 2 * 10**8
    assert found["rollout passes"].rollout == max(sampling, 200_000_000) == sampling
    engine = rows(replace(SETTINGS, engine=5 * BILLION, num_slots=0))
    assert engine["rollout engine"].rollout == 5 * BILLION and "keys and values" not in engine
    awake = rows(replace(SETTINGS, engine=5 * BILLION, engine_asleep=5 * BILLION))
    assert (engine["rollout engine"].step, awake["rollout engine"].step) == (0, 5 * BILLION)


def test_the_peak_is_the_fullest_moment_with_what_is_assumed() -> None:
    parts = plan_parts(SETTINGS)
    counted = [part for part in parts if not part.name.endswith("assumed")]
    expected = max(sum(getattr(p, m) for p in counted) for m in ("rollout", "backward", "step"))
    assert peak(parts) == pytest.approx(expected * (1 + SLACK) + CONTEXT)
    assert peak(parts) != pytest.approx(expected + CONTEXT, rel=0.01)
