"""Rollouts: the slot engine against Hugging Face's own ways, on token-identical rollouts.

In float32 every engine first has to sample the same tokens; in bfloat16 rounding decides near ties, so there only the
lengths are equal. Ratios are of CPU time on one thread (or of CUDA time), variants in turn. What waits for searches is
measured in wall time, and has no bar. Continuous batching needs psutil.

    python -m benchmarks.bench_rollout [--size small] [--device cuda] [--parts peers slots searches]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from importlib.util import find_spec

from benchmarks.harness import Bar, Report, Timing, compare, pin_threads

pin_threads()

import torch  # noqa: E402

from benchmarks.rollout_peers import (  # noqa: E402
    ContinuousBatching,
    GenerateKeptCache,
    GeneratePerTurn,
    GenerateStaticCache,
)
from benchmarks.workload import ScriptedRetriever, Workload, make_policy, make_workload, run  # noqa: E402
from sdsearch_lightning.policy.policy import Policy  # noqa: E402
from sdsearch_lightning.rollout import Engine, GenerateEngine, SearchPool, SlotEngine  # noqa: E402
from sdsearch_lightning.rollout.search_pool import SearchResult  # noqa: E402
from sdsearch_lightning.types import Trajectory  # noqa: E402

PEERS: dict[str, Callable[[], Engine]] = {
    "generate per turn": GeneratePerTurn,
    "generate, cache kept": GenerateKeptCache,
    "generate, static cache": GenerateStaticCache,
    "continuous batching": ContinuousBatching,
    "reference engine": GenerateEngine,
}
BARS = {
    "tiny": {"generate per turn": 2.5, "generate, cache kept": 2.0, "continuous batching": 2.5},
    "small": {"generate per turn": 1.5, "generate, cache kept": 1.5, "continuous batching": 1.5},
}
"""Time of a peer over time of the slot engine, at least."""
MAX_LOGPROB_ERROR = 5e-5
"""In float32, against one forward pass over the finished rollout."""
LATENCIES = (0.0, 0.1, 1.0)
OURS = "slots"


class Benchmark:
    """A policy, a workload and a report.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        is_small = options.size == "small"
        self.dtype = torch.bfloat16 if is_small else torch.float32
        self.policy = make_policy(options.size, self.dtype, options.device)
        self.workload = self._make_workload(options.questions or (2 if is_small else 4))
        self.report = Report(f"bench_rollout_{options.size}", vars(options))
        self.ours, self.peers = SlotEngine(), {name: make() for name, make in PEERS.items()}
        if find_spec("psutil") is None:
            del self.peers["continuous batching"]
            print("continuous batching is left out: it needs psutil", flush=True)

    def check(self) -> None:
        """All engines sample the same tokens, and the recorded log-probs are those of a forward pass.

        It also warms every engine up; where tokens are not compared, a few rollouts are enough.
        """
        is_exact = self.dtype == torch.float32
        workload = self.workload if is_exact else self._make_workload(1, group_size=2)
        expected: list[tuple[int, ...]] = []
        for name, engine in {OURS: self.ours, **self.peers}.items():
            trajectories = run(engine, self.policy, workload)
            tokens = [trajectory.token_ids for trajectory in trajectories]
            expected = expected or tokens
            if is_exact:
                num_equal = sum(mine == other for mine, other in zip(tokens, expected, strict=True))
                bar = Bar.counted(f"{name}: rollouts equal to those of {OURS}", num_equal / len(tokens), at_least=1)
                self.report.add("equality", bar)
            if name in (OURS, "continuous batching", "reference engine"):
                error = max(logprob_error(self.policy, trajectory) for trajectory in trajectories)
                bound = MAX_LOGPROB_ERROR if is_exact and name == OURS else None
                self.report.add("equality", Bar.counted(f"{name}: largest log-prob error", error, at_most=bound))

    def compare_peers(self) -> None:
        """Each peer against the slot engine."""

        def measure() -> list[Bar]:
            engines = {OURS: self.ours, **self.peers}
            timings = self._compare({name: self._runs(engine) for name, engine in engines.items()})
            say(timings, self.workload)
            bounds = BARS[self.options.size] if self.options.device == "cpu" else {}
            return [Bar.of(f"{name} / {OURS}", timings[name], timings[OURS], bounds.get(name)) for name in self.peers]

        bars = measure()
        if not all(bar.is_met for bar in bars):
            bars = measure()
        for bar in bars:
            self.report.add("peers", bar)

    def compare_slots(self) -> None:
        """Fewer slots, and no prompts in common, against a slot for every rollout of groups that share theirs."""
        num_rollouts = len(self.workload.requests)
        apart = self._make_workload(self.workload.requests[-1].instance_id[1] + 1, shared_prompts=False)
        variants = {OURS: self._runs(self.ours), "prompts apart": self._runs(SlotEngine(), apart)}
        for divisor in (2, 4):
            count = max(1, num_rollouts // divisor)
            variants[f"{count} slots"] = self._runs(SlotEngine(max_slots=count))
        timings = self._compare(variants)
        for name in [name for name in variants if name != OURS]:
            self.report.add("slots", Bar.of(f"{name} / {OURS}, {num_rollouts} slots", timings[name], timings[OURS]))

    def compare_searches(self) -> None:
        """What a slow retriever costs: wall time over that without latency, and how much of it is waiting."""
        workload = self._make_workload(2)
        waited: dict[str, list[float]] = {}
        variants: dict[str, Callable[[], object]] = {}
        engines = {
            "slots, overlap 4": SlotEngine(overlap_steps=4),
            "slots, overlap null": SlotEngine(overlap_steps=None),
            "reference engine": GenerateEngine(),
        }

        def go(name: str, engine: Engine, latency: float) -> None:
            pool = WaitedPool(ScriptedRetriever(workload.documents, latency), top_k=1)
            run(engine, self.policy, workload, pool)
            waited.setdefault(name, []).append(pool.seconds)

        for name, engine in engines.items():
            for latency in LATENCIES:
                key = f"{name}: {latency:g} s"
                variants[key] = partial(go, key, engine, latency)
        timings = compare(variants, self.options.repetitions, warmup=0, device=self.options.device, wall=True)
        for latency in LATENCIES[1:]:
            lock_step = Timing(tuple(waited[f"reference engine: {latency:g} s"]))
            for name in engines:
                key = f"{name}: {latency:g} s"
                bar = Bar.of(f"{key} per search / none", timings[key], timings[f"{name}: 0 s"])
                self.report.add("searches", bar, "wall time")
                bar = Bar.of(f"{key} per search: waited / by lock-step", Timing(tuple(waited[key])), lock_step)
                self.report.add("searches", bar, "wall time in which nothing decodes")

    def _make_workload(
        self, num_questions: int, group_size: int | None = None, shared_prompts: bool = True
    ) -> Workload:
        vocab_size, group_size = self.policy.model.config.vocab_size, group_size or self.options.group_size
        return make_workload(num_questions, group_size, vocab_size, shared_prompts=shared_prompts)

    def _runs(self, engine: Engine, workload: Workload | None = None) -> Callable[[], object]:
        return partial(run, engine, self.policy, workload or self.workload)

    def _compare(self, variants: dict[str, Callable[[], object]]) -> dict[str, Timing]:
        # The check has run every engine.
        return compare(variants, self.options.repetitions, warmup=0, device=self.options.device)


class WaitedPool(SearchPool):
    """Counts the seconds in which its caller had nothing to do but wait for an answer."""

    seconds = 0.0

    def submit(self, queries: Sequence[str]) -> Future[list[SearchResult]]:
        """See `SearchPool.submit`."""
        future = super().submit(queries)
        take = future.result

        def result(timeout: float | None = None) -> list[SearchResult]:
            start = time.perf_counter()
            answers = take(timeout)
            self.seconds += time.perf_counter() - start
            return answers

        future.result = result  # type: ignore[method-assign]
        return future


@torch.no_grad()
def logprob_error(policy: Policy, trajectory: Trajectory) -> float:
    """Largest distance between recorded log-probs and those of one forward pass of the stock model."""
    tokens = torch.tensor(trajectory.token_ids, device=policy.model.device)
    logits = policy.model(input_ids=tokens[None], use_cache=False).logits[0, :-1].float()
    logprobs = logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    recorded = torch.tensor(trajectory.sampled_logprobs[1:], device=logits.device)
    mask = torch.tensor(trajectory.policy_mask[1:], device=logits.device)
    return float((logprobs - recorded)[mask].abs().max())


def say(timings: dict[str, Timing], workload: Workload) -> None:
    """Prints the samples: for a reader of the log, never a result."""
    for name, timing in timings.items():
        samples = " ".join(f"{sample:.2f}" for sample in timing.samples)
        rate = workload.num_policy_tokens / timing.median
        print(f"{name:22} s: {samples}   policy tokens per s: {rate:.0f}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts asked for; the exit code is 1 where a bar was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_rollout", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=sorted(BARS), default="tiny", help="tiny: float32, small: bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--questions", type=int, help="default: 4, small: 2")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=3)
    parts = {
        "peers": Benchmark.compare_peers,
        "slots": Benchmark.compare_slots,
        "searches": Benchmark.compare_searches,
    }
    parser.add_argument("--parts", nargs="+", choices=sorted(parts), default=["peers"], help="default: peers")
    benchmark = Benchmark(parser.parse_args(argv))
    benchmark.check()
    for part in benchmark.options.parts:
        parts[part](benchmark)
    return benchmark.report.finish()


if __name__ == "__main__":
    sys.exit(main())
