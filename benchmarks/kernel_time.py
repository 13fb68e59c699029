"""Where a device spends its time, from torch's profiler: which kind of kernels run, and when none does.

Next: gpu_stages.py, whose figures miss a bar for one of these reasons.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "attention": re.compile(r"attention|scaled_dot_product|varlen", re.I),
    "products": re.compile(r"^aten::_?(mm|addmm|bmm|baddbmm|linear|grouped_mm)\b", re.I),
    "sorting": re.compile(r"^aten::(topk|sort|argmax|max|amax)\b", re.I),
}
"""Operators by name; what fits none is element by element, a sum, or a copy."""
REST = "the rest"


def kind_of(operator: str) -> str:
    """What an operator's kernels do."""
    return next((kind for kind, pattern in KINDS.items() if pattern.search(operator)), REST)


def kernel_seconds(function: Callable[[], object], device: str) -> dict[str, float]:
    """Seconds of each kind in one call: of kernels by the operator that asked for them, or of operators on a CPU.

    Kernels that a CUDA graph replays have no operator and are left out: profile what is not recorded.
    """
    on_gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        function()
        if on_gpu:
            torch.cuda.synchronize()
    found: Counter[str] = Counter()
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CPU:  # others are the kernels themselves
            found[kind_of(event.key)] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    return {kind: found[kind] / 1e6 for kind in (*KINDS, REST)}


def busy_seconds(function: Callable[[], object], device: str) -> float:
    """Time in which kernels run during one call, recorded ones too; they run one after the other."""
    on_gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        function()
        if on_gpu:
            torch.cuda.synchronize()
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]  # as objects they take minutes
    return sum(e.duration_ns() for e in events if e.device_type() == wanted and not e.is_user_annotation()) / 1e9
