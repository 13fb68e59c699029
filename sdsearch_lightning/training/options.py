"""Options of both modules that are more than a number or a name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable

from sdsearch_lightning.policy.packing import LayoutName

ProtocolName = Literal["search_r1", "autorefine"]
DtypeName = Literal["float32", "float64", "bfloat16"]
ADAMW: dict[str, Any] = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-6, "weight_decay": 0.01}}
"""`adamw` as a configuration file has it: the command line's default, so that `model.optimizer.lr` alone can be set."""


def adamw(params: Iterable[Any]) -> torch.optim.Optimizer:
    """The default optimizer of SDSearchModule: torch's AdamW with a learning rate of 1e-6 and weight decay 0.01."""
    return torch.optim.AdamW(params, **ADAMW["init_args"])


@dataclass
class OptimizerSpec:
    """An optimizer and the parameters it gets."""

    optimizer: OptimizerCallable
    """class_path and init_args of an optimizer, without the parameters."""
    parameters: str = ".*"
    """Regular expression searched in parameter names; the first optimizer that matches takes the parameter."""


@dataclass(frozen=True)
class Compute:
    """How passes through the model are run; nothing here changes a loss."""

    layout: LayoutName = "shared_prefix"
    """How sequences share a pass: shared_prefix reads a group's prompt once, packed has no padding, padded is the
    reference, for models that cannot do the others."""
    long_context: bool = False
    """For models with two sets of rotary frequencies (longrope: Phi-3.5, Phi-4-mini): take the set for contexts beyond
    the original one, for all sequences of the run. With false, longer sequences are refused."""
    wide_head: bool = True
    """With trainer.precision bf16-mixed, compute logits in float32, as the weights are: in bfloat16 one of 16 to 32 is
    rounded to an eighth. With false, the output layer is computed as all others are."""
    gradient_checkpointing: bool = False
    """Keep the layers' inputs only and compute the rest again: a third more time for much less memory."""
    compile_layers: bool = False
    """Compile the norms and the feed-forward part of each layer (torch.compile), which makes few kernels of many. Takes
    a minute or so in the first step, and a C++ compiler or Triton. Off, as no GPU has measured it yet."""
