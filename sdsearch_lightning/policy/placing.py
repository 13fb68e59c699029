"""How numbers of the host get to a device: index lists, positions, keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Place = Callable[[Sequence[Any], torch.device, torch.dtype], Tensor]
"""Puts numbers on a device."""


def plainly(numbers: Sequence[Any], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The host waits until they are there; on CUDA, that is until the device has done all work before."""
    return torch.tensor(numbers, dtype=dtype, device=device)


def through_pinned_memory(numbers: Sequence[Any], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Nobody waits: the copy takes its turn among the device's work, from memory that stays until then."""
    made = torch.tensor(numbers, dtype=dtype)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made
