"""On CUDA: the same rollouts, attention, losses and runs as on the CPU; graphs on and off give the same tokens."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.bench_sd_overhead import block_prompt, distilled_loss
from benchmarks.bench_train_step import CASES, make_batch, make_group, make_model, make_module, student_loss
from helpers.models import TalkativePolicy
from helpers.slots import TALK_LIMITS, essences, run_engine, talk_requests
from helpers.workplace import COLD_START, FIT, Workplace
from sdsearch_lightning.policy.attention import Call, CausalSegments, Segment
from sdsearch_lightning.policy.compiling import compile_layers
from sdsearch_lightning.policy.flash import is_available
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.retrieval.scan import half_step
from sdsearch_lightning.retrieval.torch_index import TorchIndex
from sdsearch_lightning.rollout import Engine, GenerateEngine, SlotEngine
from sdsearch_lightning.types import Trajectory

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TREE = [Segment(64), Segment(50, 0), Segment(200, 0), Segment(33), Segment(1, 3), Segment(130, 3), Segment(300)]
LAYOUTS = ("padded", "packed", "shared_prefix")


def rollouts(engine: Engine, codec: TokenCodec, device: str, dtype: torch.dtype = torch.float64) -> list[Trajectory]:
    policy = TalkativePolicy(codec).to(device, dtype)
    return run_engine(engine, policy, codec, talk_requests(codec, 8), TALK_LIMITS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rollouts_are_those_of_the_cpu(dtype: torch.dtype, word_codec: TokenCodec) -> None:
    expected = rollouts(SlotEngine(), word_codec, "cpu", dtype)
    late = [SlotEngine(async_scheduling=True, cuda_graphs=graphs) for graphs in (True, False)]
    engines = (SlotEngine(), SlotEngine(cuda_graphs=False), SlotEngine(max_slots=7), GenerateEngine(), *late)
    for engine in engines:
        found = rollouts(engine, word_codec, "cuda", dtype)
        same = sum(a == b for a, b in zip(essences(found), essences(expected), strict=True))
        assert same >= len(expected) * (1 if dtype == torch.float64 else 0.9)
        for one, other in zip(found, expected, strict=True):
            if one.token_ids == other.token_ids:
                mine, theirs = (torch.tensor(t.sampled_logprobs) for t in (one, other))
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5 if dtype == torch.float64 else 1e-4)


def test_a_decode_step_is_recorded(word_codec: TokenCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the test above would compare plain steps with plain steps."""
    recorded, original = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (recorded.append(1), original(graph))[1])
    rollouts(SlotEngine(), word_codec, "cuda")
    assert len(recorded) > 10


def synchronizing(caught: pytest.WarningsRecorder) -> list[str]:
    """Where the host waited for the device."""
    return [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing CUDA" in str(w.message)]


def test_async_scheduling_does_not_wait_at_each_step(word_codec: TokenCodec) -> None:
    waits = []
    for engine in (SlotEngine(), SlotEngine(async_scheduling=True)):
        rollouts(engine, word_codec, "cuda")  # what is loaded and recorded once
        engine.take_counts()
        try:
            with pytest.warns(UserWarning) as caught:
                torch.cuda.set_sync_debug_mode("warn")
                torch.ones(1, device="cuda").item()
                rollouts(engine, word_codec, "cuda")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits.append(synchronizing(caught))
    steps = engine.take_counts().steps
    assert len(waits[0]) > 2 * steps and len(waits[1]) < steps / 2, (steps, len(waits[0]), waits[1])


def test_recordings_under_autocast(word_codec: TokenCodec) -> None:
    with torch.autocast("cuda", torch.bfloat16):
        plain = rollouts(SlotEngine(cuda_graphs=False), word_codec, "cuda", torch.float32)
        found = rollouts(SlotEngine(), word_codec, "cuda", torch.float32)
    same = sum(a == b for a, b in zip(essences(found), essences(plain), strict=True))
    assert same >= 0.9 * len(plain)


@pytest.mark.parametrize("window", [None, 40])
def test_one_kernel_for_all_segments(window: int | None) -> None:
    assert is_available(), "this release of torch has no attention over sequences back to back"
    torch.manual_seed(0)
    total = sum(segment.length for segment in TREE)
    exact = [torch.randn(1, heads, total, 64, device="cuda", dtype=torch.float64) for heads in (8, 2, 2)]
    weight = torch.randn(1, 8, total, 64, device="cuda", dtype=torch.float64)

    def attend(dtype: torch.dtype, way: str) -> list[Tensor]:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in exact]
        output = getattr(CausalSegments(TREE), way)(Call(0, *leaves, window=window))
        return [output.detach(), *torch.autograd.grad((output * weight.to(dtype)).sum(), leaves)]

    expected, found = attend(torch.float64, "attend"), attend(torch.bfloat16, "_fused")
    for one, other in zip(found, expected, strict=True):
        assert float((one.detach().double() - other.detach()).norm() / other.detach().norm()) < 1e-2
    apart = CausalSegments([Segment(s.length) for s in TREE]).attend(Call(0, *(x.bfloat16() for x in exact)))
    assert float((apart.double() - expected[0]).norm() / expected[0].norm()) > 0.1, "prefixes count"


@pytest.mark.parametrize("layout", [*LAYOUTS, "compiled"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_the_whole_step_is_that_of_the_cpu(layout: str, dtype: torch.dtype, tolerance: float) -> None:
    """Teacher, student, head and both losses; gradients of all weights."""
    model, case = make_model("tiny"), CASES["tiny"]
    group = make_group(case, model.config.vocab_size)
    prompt = block_prompt(8, model.config.vocab_size)

    def step(device: str, dtype: torch.dtype, layout: str) -> tuple[float, Tensor]:
        name = "shared_prefix" if layout == "compiled" else layout
        module = make_module(copy.deepcopy(model).to(device, dtype), name).to(device)
        module.jsd_weight = 0.5
        if layout == "compiled":
            compile_layers(module.policy.model.get_decoder())
        batch = make_batch([group], dtype, prompt).to(device)
        loss = distilled_loss(module, batch)
        loss.backward()
        grads = [p.grad.double().flatten().cpu() for p in module.policy.parameters() if p.grad is not None]
        return float(loss.detach()), torch.cat(grads)

    (loss, gradient), (expected, wanted) = step("cuda", dtype, layout), step("cpu", torch.float32, "padded")
    assert float((gradient - wanted).norm() / wanted.norm()) < tolerance
    assert abs(loss - expected) < tolerance * max(1, abs(expected))


def test_exact_search(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((70_000, 96), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    np.save(tmp_path / "v.npy", vectors)
    queries = np.ascontiguousarray(vectors[::1000] + 0.1 * rng.standard_normal((70, 96), dtype=np.float32))
    expected, wanted = TorchIndex(tmp_path / "v.npy", "cpu", "float32").search(queries, 5)
    for scan in ("bfloat16", "float32"):
        scores, rows = TorchIndex(tmp_path / "v.npy", "cuda", scan).search(queries, 5)
        assert (rows == wanted).mean() > 0.995 and np.abs(scores - expected).max() < 1e-5


@pytest.mark.parametrize("num_rows", [40, 3000, 200_000])
@pytest.mark.parametrize("num_queries", [1, 64, 512])
def test_products_in_bfloat16_are_summed_in_float32(num_queries: int, num_rows: int) -> None:
    """What the scan's bound takes for granted; a sum in parts that are rounded would be further off."""
    torch.manual_seed(0)
    vectors, asked = (
        torch.nn.functional.normalize(torch.randn(count, 768, device="cuda"), dim=1).bfloat16()
        for count in (num_rows, num_queries)
    )
    rough = (asked @ vectors.T).float()
    off = (rough - asked.double() @ vectors.double().T).abs()
    assert (off <= half_step(rough) + 768 * 2.0**-22).all()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    place = Workplace(tmp_path_factory.mktemp("cuda"))
    for name, text in (("cold", COLD_START), ("fit", FIT)):
        (place.path / f"{name}.yaml").write_text(text.replace("accelerator: cpu", "accelerator: gpu"))
    done = place.sdsearch("supervise", "--config", "cold.yaml")
    assert done.returncode == 0, done.stderr
    return place


STEPS = ("--trainer.max_steps", "4", "--trainer.val_check_interval", "100")


def fit(place: Workplace, name: str, *more: str) -> list[dict[str, str]]:
    done = place.sdsearch("fit", "--config", "fit.yaml", "--run.name", name, *STEPS, *more)
    assert done.returncode == 0, done.stderr
    return place.metrics(name)


def gaps(rows: list[dict[str, str]]) -> list[float]:
    return [float(row["train/logprob_gap"]) for row in rows if row.get("train/logprob_gap")]


@pytest.mark.parametrize(("precision", "bound"), [("32-true", 1e-4), ("bf16-mixed", 0.02), ("bf16-true", 0.02)])
def test_fit(place: Workplace, precision: str, bound: float) -> None:
    rows = fit(place, precision, "--trainer.precision", precision)
    found = gaps(rows)
    assert len(found) == 4 and max(found) < bound, found


@pytest.mark.filterwarnings("ignore:GPU available but not used")
def test_a_fit_in_float32_is_that_of_the_cpu(place: Workplace) -> None:
    """The first step: rollouts, rewards and losses."""
    runs = fit(place, "on_cuda"), fit(place, "on_cpu", "--trainer.accelerator", "cpu")
    one, other = (next(row for row in rows if row.get("train/loss")) for rows in runs)
    keys = [key for key in one if key.startswith("train/") and one[key] and other.get(key)]
    assert len(keys) > 10
    apart = [key for key in keys if not np.isclose(float(one[key]), float(other[key]), rtol=1e-3, atol=1e-4)]
    assert not [key for key in apart if "memory" not in key], {key: (one[key], other[key]) for key in apart}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_strategies_over_nccl(strategy: str, place: Workplace) -> None:
    name = f"by_{strategy}"
    command = ("fit", "--config", "fit.yaml", "--run.name", name, *STEPS, "--trainer.strategy", strategy)
    done = place.start("-m", "sdsearch_lightning", *command, "--trainer.precision", "bf16-mixed")
    assert done.returncode == 0, done.stderr
    assert max(gaps(place.metrics(name))) < 0.02
    last = sorted((place.run(name) / "checkpoints").glob("last*"))[0]
    exported = place.sdsearch("export", "--ckpt_path", str(last), "--output", str(place.path / f"{name}_exported"))
    assert exported.returncode == 0, exported.stderr


def test_a_resumed_run_goes_on(place: Workplace) -> None:
    whole = fit(place, "whole")
    done = place.interrupted(
        *("SIGKILL", "sdsearch_lightning.callbacks.rollout_grouping:RolloutGrouping.on_train_batch_start", "4"),
        *("before", "fit", "--config", "fit.yaml", "--run.name", "resumed", *STEPS),
    )
    assert done.returncode == -9
    rows = fit(place, "resumed")
    assert [row["step"] for row in rows] == [row["step"] for row in whole]
    losses = [[float(row["train/loss"]) for row in found if row.get("train/loss")] for found in (rows, whole)]
    np.testing.assert_allclose(*losses, rtol=1e-3, atol=1e-4)


MAX_SYNCS = 11
"""The one made here, and what was found on an H100: index lists of the layout go to the device, rows are counted."""


def test_the_host_waits_for_the_device_a_few_times_in_a_micro_batch() -> None:
    model, case = make_model("tiny", "cuda"), CASES["tiny"]
    module = make_module(model, "shared_prefix").to("cuda")
    batch = make_batch([make_group(case, model.config.vocab_size)], case.dtype).to("cuda")
    student_loss(module, batch).backward()  # what is loaded once
    try:
        with pytest.warns(UserWarning) as caught:
            torch.cuda.set_sync_debug_mode("warn")
            torch.ones(1, device="cuda").item()
            student_loss(module, batch).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = synchronizing(caught)
    assert 1 <= len(found) <= MAX_SYNCS, found
