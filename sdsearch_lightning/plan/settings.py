"""From the keys of `fit` to what the arithmetic needs: precision, how GPUs share, adapters, slots, the optimizer.

What cannot be planned is refused here, by its key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.plan.memory import GIB, Parallel, Settings
from sdsearch_lightning.plan.probe import (
    Adapters,
    MakeModel,
    Precision,
    Shape,
    count_model,
    probe_optimizer,
    probe_passes,
)
from sdsearch_lightning.policy.teachers import CopiedTeacher
from sdsearch_lightning.rollout import GenerateEngine, SlotEngine

HALF = {"bf16": torch.bfloat16, "16": torch.float16}


def settings_of(options: Any, made: Any, make_model: MakeModel, capacity: float) -> Settings:
    """What decides the memory of a run.

    Args:
        options: the parsed keys of `fit`.
        made: `model` and `rollout` of them, as objects.
        make_model: the model that they name.
        capacity: bytes of a GPU.

    Raises:
        ConfigError: something of it cannot be planned, or cannot work.
    """
    parallel, num_gpus = parallel_of(options.trainer)
    kept = getattr(torch, options.model.dtype)
    half, is_mixed = precision_of(options.trainer.precision)
    if parallel == "fsdp2":  # shards stay as they are, and are gathered in half precision
        precision = Precision(half or kept, None)
    elif is_mixed:
        precision = Precision(kept, half)
    else:  # the trainer turns all weights into that precision
        kept = half or kept
        precision = Precision(kept, None)
    adapters = adapters_of(options.model.get("lora"), kept if half and kept == half and not is_mixed else torch.float32)
    passing = replace(adapters, dtype=precision.weights) if adapters and parallel == "fsdp2" else adapters
    rollout, model = made.rollout, made.model
    layout, limits = model.compute.layout, rollout.limits
    reading = max(getattr(getattr(rollout.engine, "schedule", None), "max_prefill_tokens", 0), limits.max_tokens)
    shape = Shape(layout, limits.max_tokens, rollout.group_size, model.max_micro_batch_tokens, reading)
    passes = probe_passes(make_model, passing, precision, shape)
    num_rollouts = options.data.get("init_args", {}).get("batch_size", 256) * rollout.group_size
    num_slots, engine = engine_of(options.rollout, rollout.engine, passes.kv_row, num_rollouts, capacity)
    sleeps = getattr(rollout.engine, "sleep_level", 1) > 0
    has_reference = model.policy_terms.kl_coef > 0 and adapters is None  # else the frozen model is the reference
    copies = ["reference"] * has_reference + ["teacher"] * isinstance(model.teacher, CopiedTeacher)
    return Settings(
        model=count_model(make_model, adapters, kept),
        passes=passes,
        optimizer=probe_optimizer(model._optimizer_specs[0].optimizer, adapters.dtype if adapters else kept),
        parallel=parallel,
        num_gpus=num_gpus,
        copies=copies,
        compute_bytes=precision.compute.itemsize,
        head_bytes=(precision.weights if model.compute.wide_head else precision.compute).itemsize,
        casts_head=precision.compute != precision.weights and not model.compute.wide_head,
        checkpoints=model.compute.gradient_checkpointing,
        num_slots=num_slots,
        engine=engine,
        engine_asleep=0 if sleeps else engine,
    )


def precision_of(name: Any) -> tuple[torch.dtype | None, bool]:
    """The half precision of `trainer.precision`, None in a wide one, and whether it is mixed."""
    number, _, kind = str(name or "32-true").partition("-")
    kind = kind or ("mixed" if number in HALF else "true")  # as Lightning reads `16` and `bf16`
    if kind in ("true", "mixed") and number in HALF:
        return HALF[number], kind == "mixed"
    if (number, kind) == ("32", "true"):
        return None, False
    raise ConfigError(f"trainer.precision: plan knows 32-true, bf16-mixed, bf16-true and their like, found {name!r}.")


def parallel_of(trainer: Any) -> tuple[Parallel, int]:
    """How many GPUs work, and how they share."""
    num_gpus = num_devices(trainer.devices) * trainer.num_nodes
    strategy = trainer.strategy
    name = strategy if isinstance(strategy, str) else str(strategy.get("class_path", ""))
    given = {} if isinstance(strategy, str) else strategy.get("init_args") or {}
    known = name.rpartition(".")[2].lower()
    if known == "auto" or known.startswith("single"):
        return ("one" if num_gpus == 1 else "ddp"), num_gpus
    if known.startswith("fsdp2"):
        return "fsdp2", num_gpus
    if known.startswith("ddp"):
        return ("ddp_views" if given.get("gradient_as_bucket_view") else "ddp"), num_gpus
    raise ConfigError(f"trainer.strategy: plan knows auto, ddp and fsdp2, found {name!r}.")


def num_devices(devices: Any) -> int:
    """GPUs of a node that `trainer.devices` means; all of them, at least one, for auto."""
    if isinstance(devices, list):
        return len(devices)
    text = str(devices)
    if text in ("auto", "-1"):
        return max(1, torch.cuda.device_count())
    return len([part for part in text.split(",") if part]) if "," in text else int(text)


def adapters_of(lora: Mapping[str, Any] | None, dtype: torch.dtype) -> Adapters | None:
    """The adapters of `model.lora`; None where all weights are trained."""
    if lora is None:
        return None
    targets = lora["target_modules"]
    if isinstance(targets, str):
        targets = None if targets == "all-linear" else [targets]
    return Adapters(int(lora["r"]), targets, dtype)


def engine_of(options: Any, engine: Any, kv_row: int, num_rollouts: int, capacity: float) -> tuple[int, int]:
    """Slots, and the bytes of an engine that has memory of its own."""
    if isinstance(engine, SlotEngine):
        if kv_row > engine.kv_cache_gib * GIB:
            raise ConfigError(
                f"rollout.engine.kv_cache_gib is {engine.kv_cache_gib:g}, but one rollout of up to "
                f"{options.max_tokens} tokens takes {kv_row / GIB:.3g} GiB. Raise it, or lower rollout.max_tokens."
            )
        return min(engine.max_slots, int(engine.kv_cache_gib * GIB / kv_row), num_rollouts), 0
    if isinstance(engine, GenerateEngine):
        return min(engine.max_batch_size, num_rollouts), 0
    share = options.engine.get("init_args", {}).get("gpu_memory_utilization")
    if share is None:
        raise ConfigError(
            f"rollout.engine: plan does not know the memory of {type(engine).__name__}; it knows SlotEngine, "
            "GenerateEngine and engines with a gpu_memory_utilization."
        )
    return 0, int(share * capacity)
