"""What `python -m benchmarks.gpu` measures on a CUDA device, one function per stage; each yields named figures.

Ratios are of variants that ran in turn in one process. Shares are of rates measured on the same card just before:
bytes a copy moves, operations of a large product in bfloat16. `tiny` sizes run on a CPU too, for the test.

Next: gpu.py, which runs them.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from statistics import median

import torch
from torch import Tensor

from benchmarks.bench_sd_overhead import block_prompt, distilled_loss
from benchmarks.bench_train_step import (
    CASES,
    LAYOUTS,
    MASKED,
    LeftPadded,
    backward,
    make_batch,
    make_group,
    make_model,
    make_module,
    student_loss,
)
from benchmarks.harness import compare
from benchmarks.kernel_time import busy_seconds, kernel_seconds
from benchmarks.rollout_peers import ContinuousBatching, GenerateKeptCache, GeneratePerTurn, GenerateStaticCache
from benchmarks.workload import Shape, Workload, make_policy, make_workload, run
from sdsearch_lightning.policy.compiling import compile_layers
from sdsearch_lightning.policy.policy import Policy
from sdsearch_lightning.retrieval.scan import Rounded
from sdsearch_lightning.rollout import Engine, SlotEngine
from sdsearch_lightning.rollout.decode_graphs import PATIENCE, DecodeGraphs, capture_graph
from sdsearch_lightning.rollout.kv_rows import KVRows, KVShape
from sdsearch_lightning.rollout.sampling import Draws, sample
from sdsearch_lightning.types import Sampling

Figures = dict[str, float]
LONG = Shape((4, 4), (150, 250), (32, 64), 3.9, 0.2, (200, 300))
"""Four turns with documents, 1 400 tokens at most."""
PART = 1 << 18
"""Vectors that are made, and by the naive scan multiplied, together."""
COMPILED = "shared_prefix, compiled"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WARMUP_TOKENS = 8

Engines = Mapping[str, Callable[[], Engine]]
OTHERS: Engines = {
    "generate per turn": GeneratePerTurn,
    "continuous batching": ContinuousBatching,
    "ours, async scheduling": lambda: SlotEngine(32, async_scheduling=True),
    "generate, cache kept": GenerateKeptCache,
    "ours, not recorded": lambda: SlotEngine(32, cuda_graphs=False),
}
"""In order of worth: a stage that its box cuts off keeps the first. Each is timed on the very rollouts that ours is."""


def seconds(function: Callable[[], object], repetitions: int = 20, warmup: int = 3) -> float:
    """Median time of a call on the device."""
    timings = compare({"it": function}, repetitions, warmup, DEVICE, wall=True)
    return median(timings["it"].samples)


def ceilings(size: int = 8192) -> Figures:
    """What the card does at best: bytes/s of a copy, read and written, and FLOP/s of a product in bfloat16."""
    one, other = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    large = torch.empty(size * size * 16, device=DEVICE, dtype=torch.bfloat16)
    copied = torch.empty_like(large)
    return {
        "copy bytes/s": 2 * large.nbytes / seconds(lambda: copied.copy_(large)),
        "product FLOP/s": 2 * size**3 / seconds(lambda: one @ other),
    }


def spent(what: str, function: Callable[[], object]) -> Figures:
    """Seconds of the kernels of one call, by kind; what a time has beyond their sum, the device waited."""
    function()  # what is loaded once
    return {f"kernel seconds of {what}, {kind}": value for kind, value in kernel_seconds(function, DEVICE).items()}


# Rollouts


def decode_step(policy: Policy, num_rows: int, length: int, bytes_per_second: float) -> Figures:
    """One decode step of rows that hold `length` tokens, recorded and plain: shares of the byte limit; sampling."""
    shape = KVShape.of(policy)
    rows = KVRows(shape, num_rows, length + 64)
    rows.reach(rows.capacity)
    tokens, cells = torch.arange(1, num_rows + 1, device=DEVICE), [length] * num_rows
    recorded = DecodeGraphs(policy, rows, capture_graph if DEVICE == "cuda" else lambda step, _: step)
    plain = DecodeGraphs(policy, rows, lambda step, _: step)
    weights = sum(p.nbytes for p in policy.parameters())  # tied: the embedding is the output layer
    bound = (weights + num_rows * length * shape.bytes_per_token) / bytes_per_second
    with torch.no_grad():
        kernels = spent("a decode step", lambda: plain.advance(tokens, cells))
        replayed = seconds(lambda: recorded.advance(tokens, cells), warmup=PATIENCE + 2)
        eager = seconds(lambda: plain.advance(tokens, cells))
        logits = recorded.advance(tokens, cells).clone()
        draws = [Draws(i) for i in range(num_rows)]
        drawn = {
            f"sampling seconds, temperature {t:g}": seconds(partial(sample, logits, [Sampling(t)] * num_rows, draws))
            for t in (0.0, 1.0)
        }
    return {
        "decode seconds, recorded": replayed,
        "decode seconds, plain": eager,
        "decode share of the byte limit, recorded": bound / replayed,
        "decode share of the byte limit, plain": bound / eager,
        **drawn,
        **kernels,
    }


def rollouts(size: str, others: Engines, questions: int = 16, shape: Shape = LONG) -> Iterator[Figures]:
    """What the card does at best, one decode step, and whole rollouts: other engines, in this order, over ours."""
    policy, workload = prepared(size, questions, shape)
    top = ceilings(8192 if DEVICE == "cuda" else 64)
    yield top
    yield decode_step(policy, len(workload.requests), shape.max_tokens * 2 // 3, top["copy bytes/s"])
    yield from over_ours(policy, workload, others)


def prepared(size: str, questions: int, shape: Shape) -> tuple[Policy, Workload]:
    """A policy, and eight rollouts for each question."""
    policy = make_policy(size, torch.bfloat16 if DEVICE == "cuda" else torch.float32, DEVICE)
    return policy, make_workload(questions, 8, policy.model.config.vocab_size, shape=shape)


def over_ours(policy: Policy, workload: Workload, others: Engines) -> Iterator[Figures]:
    """Time of whole rollouts, searches answered at once: ours, then each other engine's over it."""
    ours = 0.0
    for name, make in {"ours": lambda: SlotEngine(32), **others}.items():
        engine = make()
        # Ours does everything once before, which records its steps. A peer of 256 steps of some 40 ms has no place for
        # that in the box: a few tokens of all its rows load its kernels, or compile them.
        run(engine, policy, workload if isinstance(engine, SlotEngine) else workload.opening(WARMUP_TOKENS))
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run(engine, policy, workload)
        taken = time.perf_counter() - start  # tokens were read on the host, so the device is done
        if name == "ours":
            ours = taken
            yield {"policy tokens/s": workload.num_policy_tokens / ours, "steps": engine.counts.steps}
        yield {f"rollout seconds, {name}": taken, f"{name} / ours": taken / ours}
        if name == "ours":
            again = lambda engine=engine: run(engine, policy, workload)  # noqa: E731
            yield {"ours: share of that time in which kernels run": busy_seconds(again, DEVICE) / taken}


def rollouts_static(size: str, questions: int = 16, shape: Shape = LONG) -> Iterator[Figures]:
    """Transformers' compiled decoding over ours; compiling takes longer than all rollouts, and is not timed."""
    yield from over_ours(*prepared(size, questions, shape), {"generate, static cache, compiled": GenerateStaticCache})


# Training


def train_step(size: str, repetitions: int = 5) -> Iterator[Figures]:
    """Forward and backward of one group in each layout, with and without the teacher; shares of the product rate."""
    model, case = make_model(size, DEVICE), CASES[size]
    vocabulary = model.config.vocab_size
    group = make_group(case, vocabulary)
    batch = make_batch([group], case.dtype).to(DEVICE)
    taught = make_batch([group], case.dtype, block_prompt(len(case.lengths), vocabulary)).to(DEVICE)
    top = ceilings(8192 if DEVICE == "cuda" else 64)
    modules = {layout: make_module(model, layout).to(DEVICE) for layout in LAYOUTS}
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        backward(model, partial(student_loss, modules["shared_prefix"], batch))
        yield {"peak GB, shared_prefix": torch.cuda.max_memory_allocated() / 1e9}
    copied = copy.deepcopy(model)  # compiling changes a model's layers
    modules[COMPILED] = make_module(copied, "shared_prefix").to(DEVICE)
    compile_layers(copied.get_decoder(), "inductor" if DEVICE == "cuda" else "eager")
    distilling = make_module(model, "shared_prefix").to(DEVICE)
    distilling.jsd_weight = 0.1

    def without() -> Tensor:
        return backward(model, partial(student_loss, modules["shared_prefix"], taught))

    variants: dict[str, Callable[[], Tensor]] = {
        name: partial(backward, module.policy.model, partial(student_loss, module, batch))
        for name, module in modules.items()
    }
    variants[MASKED] = partial(backward, model, LeftPadded(model, batch, all_logits=False).loss)
    variants["with the teacher"] = partial(backward, model, partial(distilled_loss, distilling, taught))
    variants["without the teacher"] = without
    timings = compare(variants, repetitions, 1, DEVICE)
    times = {name: timing.median for name, timing in timings.items()}
    layers = sum(p.numel() for p in model.get_decoder().layers.parameters())
    useful = sum(case.lengths)
    operations = 6 * layers * useful
    found = {f"step seconds, {name}": value for name, value in times.items()} | top
    found |= {
        f"share of the product rate, {n}": operations / times[n] / top["product FLOP/s"] for n in (*modules, MASKED)
    }
    found |= {f"{MASKED} / {n}": times[MASKED] / times[n] for n in modules}
    found["with / without the teacher"] = times["with the teacher"] / times["without the teacher"]
    found |= spent("a training step, shared_prefix", variants["shared_prefix"])
    yield found


# Search


def scan(num_rows: int = 21_000_000, dimension: int = 768, k: int = 5) -> Iterator[Figures]:
    """Exact search of random vectors, for few and many queries, against a product and a top k for each part of them.

    Timed up to the rows that would be read from the file in float32; the bound is reading the vectors once in bfloat16.
    """

    def random(count: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(count, dimension, device=DEVICE), dim=1)

    top = ceilings(8192 if DEVICE == "cuda" else 64)
    parts = (random(min(PART, num_rows - start)) for start in range(0, num_rows, PART))
    rounded = Rounded.of(parts, num_rows, dimension, torch.device(DEVICE))
    bound = rounded.vectors.nbytes / top["copy bytes/s"]
    yield {"bound, seconds": bound, **top}
    for count in (1, 64, 512):
        asked = random(count)
        variants: dict[str, Callable[[], object]] = {
            "ours": partial(rounded.candidates, asked, k),
            "naive": partial(naive_scan, asked.to(rounded.vectors.dtype), rounded.vectors, k),
        }
        with torch.inference_mode():
            times = {name: t.median for name, t in compare(variants, 5, 1, DEVICE, wall=True).items()}
            found = rounded.candidates(asked, k)
        yield {
            f"scan seconds, {count} queries": times["ours"],
            f"share of the limit, {count} queries": bound / times["ours"],
            f"naive / ours, {count} queries": times["naive"] / times["ours"],
            f"rows read in float32 per query, {count} queries": float(found.near_mask.sum(1).float().mean()),
            f"share of queries that would be scanned again, {count} queries": float(found.is_doubtful.float().mean()),
        }


def naive_scan(asked: Tensor, vectors: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of all scores, as they are in bfloat16: not exact."""
    found = [(asked @ part.T).topk(min(k, len(part))) for part in vectors.split(PART)]
    scores, order = torch.cat([top.values for top in found], 1).topk(k)
    rows = torch.cat([top.indices + index * PART for index, top in enumerate(found)], 1)
    return scores, rows.gather(1, order)
