"""How many threads a run on a CPU gets: as many as cores are free when it starts."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Literal

import torch

STAT = Path("/proc/stat")
QUOTA = Path("/sys/fs/cgroup/cpu.max")


def use_threads(asked: int | Literal["auto"] | None) -> None:
    """Set the threads of PyTorch's operations in this process, as `run.num_threads` says.

    Where Lightning starts several processes it shares the cores among them itself, whatever `auto` found.
    """
    if asked is not None:
        torch.set_num_threads(free_cores() if asked == "auto" else asked)


def usable_cores() -> int:
    """Cores that this process may run on, at least 1: those of its affinity, as far as a container's quota goes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = QUOTA.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))


def free_cores(seconds: float = 0.5) -> int:
    """Usable cores that nobody else uses, at least 1: by the share of time that all cores were idle for so long.

    A second thread on a core that another process uses holds the first one up at the end of every operation: both wait.
    """
    cores, first = usable_cores(), _idle_and_all()
    if cores == 1 or first is None:
        return cores
    time.sleep(seconds)
    second = _idle_and_all()
    if second is None or second[1] <= first[1]:
        return cores
    idle = (second[0] - first[0]) / (second[1] - first[1])
    return max(1, round(cores * idle))


def _idle_and_all() -> tuple[int, int] | None:
    """Ticks of all cores since the machine started: those without work, and all; None where nobody counts them."""
    try:
        ticks = [int(field) for field in STAT.read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
        return ticks[3] + ticks[4], sum(ticks)
    except (OSError, ValueError, IndexError):
        return None
