"""`sdsearch plan`: prints memory per GPU by part for the settings of `fit`, and refuses what cannot fit.

The same parser as `fit` reads the same files and keys, so what is planned is what would run.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sdsearch_lightning.cli.settings import SettingsCLI
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.plan.architecture import find_architecture
from sdsearch_lightning.plan.disk import Disk, disk_of
from sdsearch_lightning.plan.memory import GIB, Part, Settings, plan_parts
from sdsearch_lightning.plan.settings import settings_of

MOMENTS = {"rollout": "rollout", "backward": "backward", "step": "optimizer step"}
DEFAULT_GPU_GIB = 80.0
STATES = ("weights", "optimizer state", "gradients", "gathered weights", "gathered layers")
WAYS = {
    "teacher copy": "model.teacher LiveTeacher, which needs no copy",
    "reference copy": "model.kl_coef 0, which needs no reference copy",
    "DDP buckets": "DDPStrategy with gradient_as_bucket_view true",
    "optimizer's work": "an optimizer with fused: true",
    "keys and values": "fewer slots (rollout.engine.kv_cache_gib)",
    "rollout passes": "lower rollout.engine.max_prefill_tokens",
    "rollout engine": "lower gpu_memory_utilization",
    "passes": "lower model.max_micro_batch_tokens and rollout.max_tokens (a group is never split)",
}
"""What makes a part smaller, whatever else is set."""


class PlanCLI(SettingsCLI):
    """Makes the module and the rollouts of the keys."""

    made: Any

    def instantiate_classes(self) -> None:
        """`model` and `rollout` alone: neither files nor a retriever are needed to plan."""
        options = self.options.clone()
        options.data = options.trainer = None
        self.made = self._parser("fit").instantiate_classes(options)


def plan(own: argparse.Namespace, keys: Sequence[str]) -> None:
    """Prints the table, and refuses what it shows not to fit.

    Args:
        own: options of `plan_parser`.
        keys: those of `fit`, as they were given.
    """
    cli = PlanCLI(["fit", *keys])
    on_cpu = cli.options.trainer.accelerator == "cpu"
    capacity = (own.gpu_memory_gib or _detected_gib(on_cpu)) * GIB
    make_model, source = find_architecture(cli.options.model.model_name_or_path, own.model_config)
    settings = settings_of(cli.options, cli.made, make_model, capacity)
    parts, told = plan_parts(settings), f"{cli.options.trainer.precision or '32-true'}, shape from {source}"
    print_plan(settings, parts, told, capacity, ("process", "this machine") if on_cpu else ("GPU", "one GPU"))
    print_disk(planned_disk(cli, settings))
    check_fit(settings, parts, capacity, "process" if on_cpu else "GPU")


def planned_disk(cli: PlanCLI, settings: Settings) -> Disk:
    """What the run of these keys writes."""
    options, rollout = cli.options, cli.made.rollout
    per_process = options.data.get("init_args", {}).get("batch_size", 256) * rollout.group_size
    steps = options.trainer.max_steps
    num_steps = steps if steps and steps > 0 else None
    run = options.run
    return disk_of(
        settings,
        per_process * settings.num_gpus,
        rollout.limits.max_tokens,
        num_steps,
        run.checkpoint_keep,
        run.checkpoint_keep_every,
    )


def print_disk(disk: Disk) -> None:
    """Print what a run takes on disk, in GB, as file systems count."""
    each = f"{disk.num_checkpoints} x {disk.checkpoint / 1e9:.3g} GB"
    print(f"disk: checkpoints {each} (run.checkpoint_keep), one more with best.ckpt")
    every = "" if disk.rollouts is None else f", {disk.rollouts / 1e9:.3g} GB packed for all {disk.num_steps}"
    print(f"disk: rollouts up to {disk.step / 1e9:.3g} GB a step{every} (docs/running.md)")


def print_plan(
    settings: Settings,
    parts: Sequence[Part],
    origin: str,
    capacity: float,
    device: tuple[str, str] = ("GPU", "one GPU"),
) -> None:
    """Print the table of parts, in GiB per device at each moment."""
    (name, owner), model, console = device, settings.model, Console(width=110, highlight=False)
    count = f"{settings.num_gpus} {name}{'es' if name.endswith('s') else 's'}, {settings.parallel}"
    gpus = f"1 {name}" if settings.num_gpus == 1 else count
    numbers = f"{model.num_parameters / 1e9:.3g} B parameters, {model.num_trained / 1e9:.3g} B trained"
    console.print(f"{numbers}; {gpus}, {origin}\n", markup=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(f"GiB per {name}", no_wrap=True)
    for title in MOMENTS.values():
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("what")
    for part in parts:
        table.add_row(part.name, *(_gib(getattr(part, moment)) for moment in MOMENTS), part.why)
    sums = sums_of(parts)
    table.add_row("sum", *(_gib(size) for size in sums.values()), f"peak {_gib(max(sums.values()))}", style="bold")
    console.print(table)
    console.print(f"\n{owner}: {capacity / GIB:.1f} GiB. A retriever or encoder there comes on top.")


def check_fit(settings: Settings, parts: Sequence[Part], capacity: float, name: str = "GPU") -> None:
    """Refuses a peak above the capacity.

    Raises:
        ConfigError: names the largest parts and what would make them smaller.
    """
    sums = sums_of(parts)
    moment = max(sums, key=lambda name: sums[name])
    if sums[moment] <= capacity:
        return
    sizes = {part.name: getattr(part, moment) for part in parts if not part.name.endswith("assumed")}
    ordered = sorted((name for name in sizes if sizes[name]), key=lambda name: -sizes[name])
    told = ", ".join(f"{name} {_gib(sizes[name])}" for name in ordered[:4])
    ways = dict.fromkeys(_way(settings, name) for name in ordered)
    raise ConfigError(
        f"plan: expected at most {capacity / GIB:.1f} GiB per {name}, found {sums[moment] / GIB:.1f} at the peak "
        f"({MOMENTS[moment]}).\nLargest parts: {told} GiB.\nWhat helps: {'; '.join(list(ways)[:4])}."
    )


def _way(settings: Settings, name: str) -> str:
    """The option that makes a part smaller, for the advice under a plan that does not fit."""
    if name == "activations":
        return WAYS["passes"] if settings.checkpoints else "model.compute.gradient_checkpointing true"
    if name not in STATES:
        return WAYS[name]
    more = "more GPUs" if settings.parallel == "fsdp2" else "trainer.strategy fsdp2 over several GPUs"
    return more if settings.model.num_trained < settings.model.num_parameters else f"model.lora, or {more}"


def sums_of(parts: Sequence[Part]) -> dict[str, float]:
    """Bytes of all parts together, at each moment."""
    return {moment: sum(getattr(part, moment) for part in parts) for moment in MOMENTS}


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size else "-"


def _detected_gib(on_cpu: bool) -> float:
    if on_cpu:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    if not torch.cuda.is_available():
        return DEFAULT_GPU_GIB
    return torch.cuda.get_device_properties(0).total_memory / GIB
