"""The output layer and the losses on its logits, at a real vocabulary: forward, backward and the gradient of W.

Hidden rows of 512 tokens are given, of which few are needed. `jsd` compares student and teacher at 64 query rows;
`step` adds the policy's loss at 256 rows, the query rows among them, as one training step does. First all variants have
to agree on loss and gradients. A peer that is not installed is left out:

    pip install "trl==1.16.*" && pip install --no-deps liger-kernel==0.8.5
    python -m benchmarks.bench_loss_head [--hidden 256] [--device cuda] [--parts jsd step]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec

from benchmarks.harness import Bar, Report, compare, peak_memory, pin_threads

pin_threads()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.loss_head_variants import (  # noqa: E402
    LIGER,
    NAIVE,
    OURS,
    PARTS,
    REFERENCES,
    TOP,
    TRL,
    Inputs,
    Loss,
)

TOLERANCE, PEERS_TOLERANCE = 1e-6, 5e-6
"""Of losses and gradients, relative, in float32; peers add up in an order of their own."""
BARS: Mapping[str, Mapping[str, float]] = {"jsd": {NAIVE: 4.0, TRL: 1.5, LIGER: 1.2}, "step": {TRL: 1.3}}
"""Time of others over ours, at least."""
MEMORY_BAR = 3.0  # peak of the naive way over ours, at least
PEERS, BLANK = {TRL: "trl", LIGER: "liger_kernel"}, dict.fromkeys(("figure", "minima", "bar", "verdict"))


def peak(part: str, variant: str, hidden_size: int, device: str) -> Iterator[str | None]:
    """For `peak_memory`; gradients are there already, as in every micro-batch but the first."""
    inputs = Inputs.make(hidden_size, device)
    inputs.student.grad, inputs.weight.grad = torch.zeros_like(inputs.student), torch.zeros_like(inputs.weight)
    yield None if device == "cpu" else device
    PARTS[part][variant](inputs).backward()


class Benchmark:
    """Inputs and a report."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.inputs = Inputs.make(options.hidden, options.device)
        self.has_bars = (options.hidden, options.device) == (896, "cpu")
        self.report = Report(f"bench_loss_head_{options.hidden}", vars(options))

    def run(self, part: str) -> None:
        """Equality, time and peak memory of the variants of a part that can run here."""
        missing = [name for name in PARTS[part] if name in PEERS and find_spec(PEERS[name]) is None]
        variants = {name: loss for name, loss in PARTS[part].items() if name not in missing}
        for step in (self.check, self.compare, self.compare_memory):
            step(part, variants)
        for name in missing:
            self.report.rows.append(BLANK | {"benchmark": part, "what": name, "note": "not installed"})

    def check(self, part: str, variants: Mapping[str, Loss]) -> None:
        """Equal losses and gradients; the top 50 is another loss."""
        expected = self._backward(REFERENCES[part])
        for name, loss in variants.items():
            found = self._backward(loss)
            if name not in (NAIVE, TOP):
                error = max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
                bound = PEERS_TOLERANCE if name in PEERS else TOLERANCE
                self.report.add(part, Bar.counted(f"{name}: error of loss, dh, dW", error, at_most=bound), "relative")

    def compare(self, part: str, variants: Mapping[str, Loss]) -> None:
        """CPU time of each over ours."""

        def measure() -> list[Bar]:
            calls = {name: partial(self._backward, loss) for name, loss in variants.items()}
            timings = compare(calls, self.options.repetitions, warmup=0, device=self.options.device)
            for name, timing in timings.items():
                print(f"{part} {name:20} s: {' '.join(f'{sample:.2f}' for sample in timing.samples)}", flush=True)
            bounds = BARS[part] if self.has_bars else {}
            pairs = {name: (timing, timings[OURS]) for name, timing in timings.items() if name != OURS}
            return [Bar.of(f"{name} / {OURS}", *pair, bounds.get(name)) for name, pair in pairs.items()]

        bars = measure()
        if not all(bar.is_met for bar in bars):
            bars = measure()
        for bar in bars:
            self.report.add(part, bar, "time")

    def compare_memory(self, part: str, variants: Mapping[str, Loss]) -> None:
        """Peak of each over ours."""
        path, settings = "benchmarks.bench_loss_head:peak", (self.options.hidden, self.options.device)
        peaks = {name: peak_memory(path, part, name, *settings) for name in variants if name != TOP}
        ours = peaks.pop(OURS)
        for name, other in peaks.items():
            bound = MEMORY_BAR if self.has_bars and name == NAIVE else None
            bar = Bar.counted(f"{name} / {OURS}", other / ours, bound)
            self.report.add(part, bar, f"peak memory, {other:.0f} / {ours:.0f} MB")

    def _backward(self, loss: Loss) -> list[Tensor]:
        """Loss, and its gradients in hidden rows and weights."""
        leaves = self.inputs.student, self.inputs.weight
        for leaf in leaves:
            leaf.grad = None
        value = loss(self.inputs)
        value.backward()
        return [value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts asked for; the exit code is 1 where a bar was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_loss_head", description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=896, help="bars are on 896")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=sorted(PARTS), default=list(PARTS))
    benchmark = Benchmark(parser.parse_args(argv))
    for part in benchmark.options.parts:
        benchmark.run(part)
    return benchmark.report.finish()


if __name__ == "__main__":
    sys.exit(main())
