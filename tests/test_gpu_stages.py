"""`make gpu` on a CPU, with sizes that say nothing: stages yield figures, which are kept where one is cut off."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CompileConfig, GenerationConfig

from benchmarks import gpu, gpu_carry, gpu_end_to_end, gpu_stages, rollout_peers
from benchmarks.harness import ROOT
from benchmarks.rollout_peers import GenerateKeptCache, GeneratePerTurn, GenerateStaticCache, _Row
from benchmarks.workload import Workload, run
from sdsearch_lightning.__main__ import main
from sdsearch_lightning.policy.policy import Policy
from sdsearch_lightning.rollout import Engine, SlotEngine

SHORT = gpu_stages.LONG.divided(8)


def tokens(engine: Engine, policy: Policy, workload: Workload) -> list[tuple[int, ...]]:
    return [trajectory.token_ids for trajectory in run(engine, policy, workload)]


def test_stages_yield_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gc.collect", lambda: 0)  # before every sample, and slow in a process as large as this one
    searched = {name: value for found in gpu_stages.scan(4096, 16) for name, value in found.items()}
    for count in (1, 64, 512):
        assert searched[f"scan seconds, {count} queries"] > 0 and searched[f"naive / ours, {count} queries"] > 0
        assert searched[f"rows read in float32 per query, {count} queries"] >= 5
    peers = {"generate, cache kept": GenerateKeptCache}
    rolled = {k: v for found in gpu_stages.rollouts("micro", peers, 1, SHORT) for k, v in found.items()}
    assert rolled["generate, cache kept / ours"] > 0 and rolled["steps"] > 0
    static = {k: v for found in gpu_stages.rollouts_static("micro", 1, SHORT) for k, v in found.items()}
    assert static["generate, static cache, compiled / ours"] > 0
    assert all(value >= 0 for value in (searched | rolled | static).values())


@pytest.mark.parametrize("peer", [GeneratePerTurn, GenerateKeptCache, GenerateStaticCache])
def test_a_peer_does_the_rollouts_that_ours_does(peer: Callable[[], Engine]) -> None:
    policy, workload = gpu_stages.prepared("micro", 1, SHORT)
    ours, others = (tokens(engine, policy, workload) for engine in (SlotEngine(), peer()))
    assert others == ours and tokens(SlotEngine(), policy, workload.opening(3)) != ours


def test_a_static_cache_that_is_full_is_read_again_without_holes() -> None:
    """Whoever ends a turn early leaves holes: with turns of many lengths they need more than the longest rollout."""
    shape = replace(SHORT, turns=(4, 4), segment=(3, 24), segment_log_mean=1.8, segment_log_deviation=0.8)
    policy, workload = gpu_stages.prepared("micro", 1, shape)
    longest = max(map(len, tokens(SlotEngine(), policy, workload)))
    surplus = shape.max_tokens - longest
    tight = replace(workload, shape=replace(shape, prompt=(0, shape.prompt[1] - surplus)))
    resets: list[int] = []

    class Counted(GenerateStaticCache):
        def make_room(self, rows: Sequence[_Row]) -> None:
            super().make_room(rows)
            resets.append(self._held.shape[1])

    assert tight.shape.max_tokens == longest
    assert tokens(Counted(), policy, tight) == tokens(SlotEngine(), policy, tight)
    assert resets.count(0) > 1, "the first turn, and one that found the cache full"


def test_a_static_cache_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU by an option for tests of transformers, with a compiler that counts: warmed up, it compiles no more."""
    graphs: list[torch.fx.GraphModule] = []

    def compiler(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    options = CompileConfig(backend=compiler, mode=None)
    options._compile_all_devices = True
    monkeypatch.setattr(rollout_peers, "GenerationConfig", partial(GenerationConfig, compile_config=options))
    policy, workload = gpu_stages.prepared("micro", 1, SHORT)
    engine = GenerateStaticCache()
    for part in (workload.opening(gpu_stages.WARMUP_TOKENS), workload):
        rolled = tokens(engine, policy, part)
    assert len(graphs) == 1 and rolled == tokens(SlotEngine(), policy, workload)


def test_whole_runs_are_timed_by_part(tmp_path: Path) -> None:
    found: dict[str, float] = {}
    runs = gpu_end_to_end.tiny(gpu_end_to_end.world_20m())
    arms = ("grpo", "best")  # each is a process
    for figures in gpu_end_to_end.end_to_end(replace(runs, arms={name: runs.arms[name] for name in arms}), tmp_path):
        found |= figures
    for arm in arms:
        assert found[f"{arm}: seconds of the command"] > found[f"{arm}: rollout/seconds, median of 1 steps"] > 0
        assert {f"{arm}: val/exact_match, {when}" for when in ("first", "last")} <= found.keys()
        assert 0 <= found[f"{arm}: rollout/exact_match, mean over steps"] <= 1
    assert "cold_start: train/loss, last" in found


@pytest.mark.parametrize(
    "runs, arms",
    [
        (gpu_end_to_end.real_facts(), ["sd_search", "grpo", "best"]),
        (gpu_end_to_end.world_20m(), ["grpo", "best", "entropy_penalty"]),
    ],
)
def test_every_option_of_the_whole_runs_is_known(
    runs: gpu_end_to_end.EndToEnd, arms: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    commands = runs.commands(str(tmp_path))
    assert list(commands) == ["cold_start", *arms]
    for command in commands.values():
        assert main([*command, "--trainer.accelerator", "cpu", "--print_config"]) == 0


def test_a_stage_that_is_cut_off_keeps_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"import time; print('{gpu.MARK}' + '{{\"a\": 1.5}}', flush=True); print('lost'); time.sleep(60)"
    monkeypatch.setattr(gpu, "command", lambda stage, tiny: [sys.executable, "-c", code])
    monkeypatch.setitem(gpu.BOXES, "scan", 3)
    found = gpu.run_stage("scan", tiny=True)
    assert found["figures"] == {"a": 1.5} and found["exit"] != 0 and found["stage"] == "scan"


def test_a_stage_does_not_outlive_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []

    class Interrupted(subprocess.Popen[str]):
        def communicate(self, *args: Any, timeout: float | None = None) -> Any:
            if timeout is not None:
                started.append(self)
                raise KeyboardInterrupt
            return super().communicate(*args)

    monkeypatch.setattr(gpu, "command", lambda stage, tiny: [sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu.run_stage("scan", tiny=True)
    assert started[0].returncode == -signal.SIGKILL


def test_a_second_run_keeps_the_stages_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []

    def run_stage(stage: str, tiny: bool) -> dict[str, object]:
        runs.append(stage)
        return {"stage": stage, "exit": int(stage == "tests"), "seconds": len(runs), "figures": {}, "output": ""}

    monkeypatch.setattr(gpu, "run_stage", run_stage)
    monkeypatch.setattr(gpu, "environment", dict)
    out = tmp_path / "new" / "gpu.json"
    assert gpu.main(["--tiny", "--out", str(out), "--stages", "tests", "scan"]) == 1
    assert gpu.main(["--out", str(out), "--stages", "scan", "loss_head"]) == 0
    found = [(s["stage"], s["seconds"], s["tiny"]) for s in json.loads(out.read_text())["stages"]]
    assert found == [("tests", 1, True), ("scan", 3, False), ("loss_head", 4, False)]
    with pytest.raises(OSError):
        gpu.main(["--out", str(out / "below" / "gpu.json"), "--stages", "scan"])
    assert len(runs) == 4, "nothing is measured that cannot be written"


def test_a_stage_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "command", lambda stage, tiny: [sys.executable, "-c", "raise SystemExit('no device')"])
    found = gpu.run_stage("tests", tiny=True)
    assert (found["exit"], found["figures"]) == (1, {}) and "no device" in str(found["output"])


def test_what_is_packed_comes_out_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts, folder, there = tmp_path / "facts", tmp_path / "carried", tmp_path / "there"
    for name, data in (("encoder/model.safetensors", b"e" * 250), ("encoder/config.json", b"{}"), ("model/x", b"left")):
        (facts / name).parent.mkdir(parents=True, exist_ok=True)
        (facts / name).write_bytes(data)
    (facts / "demonstrations.jsonl").write_text("one\n")
    (tmp_path / "weights.gguf").write_bytes(bytes(range(256)))
    monkeypatch.setattr(gpu_carry, "FACTS", facts)
    monkeypatch.setattr(gpu_carry, "PIECE", 200)
    monkeypatch.setattr(gpu_carry, "weights", lambda: tmp_path / "weights.gguf")
    monkeypatch.setattr(gpu_carry, "download", lambda target: None)
    gpu_carry.pack(folder)
    pieces = sorted(path.name for path in folder.iterdir())
    assert pieces == ["base", "piece_0", "piece_1", "piece_2"]
    assert all(sum(f.stat().st_size for f in (folder / name).iterdir()) <= 200 for name in pieces[1:])
    gpu_carry.unpack(folder, tmp_path / "site", there)
    assert (there / "encoder/model.safetensors").read_bytes() == b"e" * 250
    assert (there / "weights.gguf").read_bytes() == bytes(range(256))
    assert (there / "encoder/config.json").is_file() and (there / "demonstrations.jsonl").is_file()
    assert not (there / "model").exists()
    damaged = next((folder / "piece_1").iterdir())
    damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    with pytest.raises(SystemExit, match="another checksum"):
        gpu_carry.unpack(folder, tmp_path / "site", there)
    damaged.unlink()
    with pytest.raises(SystemExit, match="not carried"):
        gpu_carry.unpack(folder, tmp_path / "site", there)
