"""`make gpu` on a CPU, with sizes that say nothing: stages yield figures, which are kept where one is cut off."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_carry, gpu_end_to_end, gpu_stages
from benchmarks.harness import ROOT
from benchmarks.rollout_peers import GenerateKeptCache
from sdsearch_lightning.__main__ import main


def test_stages_yield_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gc.collect", lambda: 0)  # before every sample, and slow in a process as large as this one
    searched = {name: value for found in gpu_stages.scan(4096, 16) for name, value in found.items()}
    for count in (1, 64, 512):
        assert searched[f"scan seconds, {count} queries"] > 0 and searched[f"naive / ours, {count} queries"] > 0
        assert searched[f"rows read in float32 per query, {count} queries"] >= 5
    peers = {"generate, cache kept": GenerateKeptCache}
    short = gpu_stages.LONG.divided(8)
    rolled = {k: v for found in gpu_stages.rollouts("micro", peers, 1, short) for k, v in found.items()}
    assert rolled["generate, cache kept / ours"] > 0 and rolled["steps"] > 0
    assert all(value >= 0 for value in (searched | rolled).values())


def test_whole_runs_are_timed_by_part(tmp_path: Path) -> None:
    found: dict[str, float] = {}
    for figures in gpu_end_to_end.end_to_end(gpu_end_to_end.quickstart(), tmp_path):
        found |= figures
    for arm in ("grpo", "sd_search"):
        assert found[f"{arm}: seconds of the command"] > found[f"{arm}: rollout/seconds, median of 1 steps"] > 0
        assert {f"{arm}: val/exact_match, first", f"{arm}: val/exact_match, last"} <= found.keys()
    assert "cold_start: train/loss, last" in found


def test_every_option_of_the_whole_runs_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    runs = gpu_end_to_end.real_facts()
    commands = runs.commands(str(tmp_path))
    assert list(commands) == ["cold_start", "sd_search", "grpo", "best"]
    for command in commands.values():
        assert main([*command, "--trainer.accelerator", "cpu", "--print_config"]) == 0


def test_a_stage_that_is_cut_off_keeps_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"import time; print('{gpu.MARK}' + '{{\"a\": 1.5}}', flush=True); print('lost'); time.sleep(60)"
    monkeypatch.setattr(gpu, "command", lambda stage, tiny: [sys.executable, "-c", code])
    monkeypatch.setitem(gpu.BOXES, "scan", 3)
    found = gpu.run_stage("scan", tiny=True)
    assert found["figures"] == {"a": 1.5} and found["exit"] != 0 and found["stage"] == "scan"


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
