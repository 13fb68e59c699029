"""Options of both modules that are more than a number or a name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning.pytorch.cli import OptimizerCallable

from sdsearch_lightning.policy.packing import LayoutName

ProtocolName = Literal["search_r1", "autorefine"]
DtypeName = Literal["float32", "float64", "bfloat16"]


@dataclass
class OptimizerSpec:
    """An optimizer and the parameters it gets."""

    optimizer: OptimizerCallable
    """As everywhere in Lightning: class_path and init_args without the parameters."""
    parameters: str = ".*"
    """Regular expression searched in parameter names; the first optimizer that matches takes the parameter."""


@dataclass(frozen=True)
class Compute:
    """How passes through the model are run; nothing here changes a loss."""

    layout: LayoutName = "shared_prefix"
    """shared_prefix reads a group's prompt once, packed has no padding, padded is the reference; see packing.py."""
    long_context: bool = False
    """For models with two sets of rotary frequencies (longrope: Phi-3.5, Phi-4-mini): take the set for contexts beyond
    the original one, for all sequences of the run. With false, longer sequences are refused."""
    gradient_checkpointing: bool = False
    """Keep the layers' inputs only and compute the rest again: a third more time for much less memory."""
