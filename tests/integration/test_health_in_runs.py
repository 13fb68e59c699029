"""TrainingHealth as a user writes it, and on two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.workplace import PROCESSES, Workplace

SCRIPT = PROCESSES / "health_two_ranks.py"

YAML = """\
run: {name: %s, checkpoint_every: 1}
trainer:
  callbacks:
  - class_path: TrainingHealth
    init_args:
      action: stop
      rules: {queries: {metric: rollout/policy_tokens, how: above, bound: 1, patience: 3}%s}
"""


def test_a_run_is_stopped_with_its_best_checkpoint_and_is_the_same_until_then(workplace: Workplace) -> None:
    (workplace.path / "health.yaml").write_text(YAML % ("health", ""))
    done = workplace.start("-m", "sdsearch_lightning", "fit", "--config", "fit.yaml", "--config", "health.yaml")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("TrainingHealth, step 3, queries: rollout/policy_tokens is ") == 1, done.stderr
    rows = workplace.metrics("health")
    assert rows[-1]["step"] == "3", "the run ended there, with its validation"
    trained = [row for row in rows if row["train/loss"]]
    assert [float(row.pop("health/alerts")) for row in trained][:2] == [0.0, 0.0]
    plain = [row for row in workplace.metrics("rl") if row["train/loss"]][:3]
    shared = set(plain[0]) & set(trained[0])
    assert "train/loss" in shared and "rollout/reward" in shared
    assert [[row[key] for key in sorted(shared)] for row in trained] == [
        [row[key] for key in sorted(shared)] for row in plain
    ]
    assert (workplace.run("health") / "summary.json").is_file()


def test_a_rule_that_cannot_be_is_one_short_line(workplace: Workplace) -> None:
    (workplace.path / "wrong.yaml").write_text(YAML % ("wrong", ", kl: {metric: train/kll}"))
    done = workplace.start("-m", "sdsearch_lightning", "fit", "--config", "fit.yaml", "--config", "wrong.yaml")
    assert done.returncode == 2
    assert "metric: found 'train/kll', expected one of" in done.stderr and len(done.stderr.splitlines()) <= 3


@pytest.mark.distributed
def test_two_ranks_stop_together_on_what_only_one_of_them_sees(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "NODE_RANK")}
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    # The mean KL is 1.55 from the fourth step on, and the patience 2.
    assert first == second and first["step"] == 5
    assert done.stderr.count("TrainingHealth, step 5, kl: train/kl is 1.55, above 1") == 1
