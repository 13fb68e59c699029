"""`sdsearch plan`: prints memory per GPU by part for the settings of `fit`, and refuses what cannot fit.

The same parser as `fit` reads the same files and keys, so what is planned is what would run. Next: settings.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sdsearch_lightning.cli import SearchCLI
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.plan.architecture import find_architecture
from sdsearch_lightning.plan.memory import GIB, Part, Settings, plan_parts
from sdsearch_lightning.plan.settings import settings_of

MOMENTS = {"rollout": "rollout", "backward": "backward", "step": "optimizer step"}
DEFAULT_GPU_GIB = 80.0
WAYS: dict[str, str] = {
    "weights": "model.lora (frozen weights in bfloat16), or trainer.strategy fsdp2 over more GPUs",
    "optimizer state": "model.lora, or trainer.strategy fsdp2 over more GPUs (both shrink it)",
    "gradients": "model.lora, or trainer.strategy fsdp2 over more GPUs",
    "reference copy": "model.kl_coef 0 or model.lora (no reference copy)",
    "teacher copy": "model.teacher LiveTeacher (no copy)",
    "DDP buckets": "DDPStrategy with gradient_as_bucket_view true",
    "optimizer's work": "a fused optimizer (init_args: {fused: true})",
    "activations": "model.compute.gradient_checkpointing true",
    "passes": "lower model.max_micro_batch_tokens and rollout.max_tokens (a group is never split)",
    "keys and values": "lower rollout.engine.kv_cache_gib",
    "rollout passes": "lower rollout.engine.max_prefill_tokens or max_slots",
    "rollout engine": "lower gpu_memory_utilization",
    "gathered weights": "model.lora on single GPUs",
}
"""What makes a part smaller."""


class PlanCLI(SearchCLI):
    """Reads the keys of `fit` and makes the module and the rollouts of them; runs nothing, writes nothing."""

    made: Any

    def before_instantiate_classes(self) -> None:
        """No run folder is touched."""

    def instantiate_classes(self) -> None:
        """`model` and `rollout` alone: neither files nor a retriever are needed to plan."""
        options = self.options.clone()
        options.data = options.trainer = None
        self.made = self._parser("fit").instantiate_classes(options)

    def after_instantiate_classes(self) -> None:
        """Nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing."""


def plan(argv: Sequence[str]) -> None:
    """Prints memory per GPU by part, for the settings that `fit` would use; exit code 2 where it cannot fit.

    Takes every key of fit: --config FILE (several, later ones win) and --key value; see `sdsearch fit --help`.
    """
    parser = argparse.ArgumentParser("sdsearch plan", description=plan.__doc__, allow_abbrev=False)
    parser.add_argument("--gpu_memory_gib", type=float, help="of one GPU; default: that of the GPU here, else 80")
    parser.add_argument("--model_config", help="a config.json, or its folder, in place of the model's own")
    own, rest = parser.parse_known_args(list(argv))
    capacity = (own.gpu_memory_gib or _detected_gib()) * GIB
    cli = PlanCLI(["fit", *rest])
    make_model, source = find_architecture(cli.options.model.model_name_or_path, own.model_config)
    settings = settings_of(cli.options, cli.made, make_model, capacity)
    parts = plan_parts(settings)
    print_plan(settings, parts, f"{cli.options.trainer.precision or '32-true'}, shape from {source}", capacity)
    check_fit(parts, capacity, settings.checkpoints)


def print_plan(settings: Settings, parts: Sequence[Part], origin: str, capacity: float) -> None:
    """The table, in GiB per GPU."""
    model, console = settings.model, Console(width=110, highlight=False)
    gpus = "1 GPU" if settings.num_gpus == 1 else f"{settings.num_gpus} GPUs, {settings.parallel}"
    numbers = f"{model.num_parameters / 1e9:.2f} B parameters, {model.num_trained / 1e9:.3g} B trained"
    console.print(f"{numbers}; {gpus}, {origin}\n", markup=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("GiB per GPU", no_wrap=True)
    for title in MOMENTS.values():
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("what")
    for part in parts:
        table.add_row(part.name, *(_gib(getattr(part, moment)) for moment in MOMENTS), part.why)
    sums = sums_of(parts)
    table.add_row("sum", *(_gib(sums[moment]) for moment in MOMENTS), f"peak {max(sums.values()) / GIB:.1f}", style="bold")
    console.print(table)
    console.print(f"\none GPU: {capacity / GIB:.1f} GiB. A retriever or encoder on the same GPU comes on top.")


def check_fit(parts: Sequence[Part], capacity: float, checkpoints: bool) -> None:
    """Refuses a peak above the capacity.

    Raises:
        ConfigError: names the largest parts and what would make them smaller.
    """
    sums = sums_of(parts)
    moment = max(sums, key=lambda name: sums[name])
    if sums[moment] <= capacity:
        return
    largest = sorted((part for part in parts if part.name in WAYS), key=lambda p: -getattr(p, moment))[:4]
    told = ", ".join(f"{part.name} {_gib(getattr(part, moment))}" for part in largest)
    ways = [WAYS["passes"] if p.name == "activations" and checkpoints else WAYS[p.name] for p in largest]
    raise ConfigError(
        f"plan: expected at most {capacity / GIB:.1f} GiB per GPU, found {sums[moment] / GIB:.1f} at the peak "
        f"({MOMENTS[moment]}).\nLargest parts: {told} GiB.\nWhat helps: {'; '.join(dict.fromkeys(ways))}."
    )


def sums_of(parts: Sequence[Part]) -> dict[str, float]:
    """Bytes at each moment."""
    return {moment: sum(getattr(part, moment) for part in parts) for moment in MOMENTS}


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size else "-"


def _detected_gib() -> float:
    if not torch.cuda.is_available():
        return DEFAULT_GPU_GIB
    return torch.cuda.get_device_properties(0).total_memory / GIB
