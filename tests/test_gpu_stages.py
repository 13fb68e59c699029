"""`make gpu` on a CPU, with sizes that say nothing: stages yield figures, which are kept where one is cut off."""

from __future__ import annotations

import sys

import pytest

from benchmarks import gpu, gpu_stages
from benchmarks.rollout_peers import GenerateKeptCache


def test_stages_yield_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gc.collect", lambda: 0)  # before every sample, and slow in a process as large as this one
    searched = {name: value for found in gpu_stages.scan(4096, 16) for name, value in found.items()}
    assert {f"scan seconds, {count} queries" for count in (1, 64, 512)} <= searched.keys()
    peers = {"generate, cache kept": GenerateKeptCache}
    short = gpu_stages.LONG.divided(8)
    rolled = {k: v for found in gpu_stages.rollouts("micro", peers, 1, short) for k, v in found.items()}
    assert rolled["generate, cache kept / ours"] > 0 and rolled["steps"] > 0
    assert all(value >= 0 for value in (searched | rolled).values())


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
