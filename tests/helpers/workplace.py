"""A folder in which commands run as a user runs them, and the configurations of a small cold start and run."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.kill_and_resume import contents
from helpers.paths import ROOT
from sdsearch_lightning.__main__ import main

PROCESSES = ROOT / "tests" / "integration" / "processes"
"""Scripts that tests start as processes of their own."""

DATA = """\
data:
  class_path: SyntheticWorldDataModule
  init_args:
    num_entities: 30
    num_relations: 4
    facts_per_entity: 4
    num_train_questions: 20
    num_val_questions: 4
    num_demonstrations: 96
    num_demonstration_worlds: 2
    batch_size: 4
    cache_dir: cache
"""

COLD_START = f"""{DATA}
run: {{name: cold, checkpoint_every: 5}}
trainer: {{max_steps: 96, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}}
model:
  protocol: autorefine
  scratch:
    options: {{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64}}
  optimizers:
  - optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.003}}}}
"""

FIT = f"""{DATA}
run: {{name: rl, checkpoint_every: 2}}
trainer:
  max_steps: 8
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  val_check_interval: 3
  check_val_every_n_epoch: null
model:
  model_name_or_path: runs/cold/model
  protocol: autorefine
  optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.001}}}}
rollout: {{group_size: 3, top_k: 2, max_searches: 2, max_turn_tokens: 8, max_observation_tokens: 16, max_tokens: 200,
          eval_samples: 1}}
jsd: {{warmup_steps: 1, weight: 0.1}}
"""


@dataclass
class Result:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


@dataclass
class Workplace:
    """A folder with configurations, in which commands run as a user runs them."""

    path: Path

    def start(self, *command: str) -> Result:
        """`python COMMAND` in a process of its own, with this checkout on the path."""
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(
            [sys.executable, *command], cwd=self.path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, start_new_session=True,
        )  # fmt: skip
        try:
            out, err = process.communicate(timeout=240)
            assert is_gone(process.pid), f"processes of {command} are left"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return Result(process.returncode, out, err)

    def interrupted(self, *arguments: str) -> Result:
        """`sdsearch ARGUMENTS`, with a signal at a chosen call: see processes/interrupted.py."""
        return self.start(str(PROCESSES / "interrupted.py"), *arguments)

    def sdsearch(self, *arguments: str) -> Result:
        """`sdsearch ARGUMENTS` in this process, which has paid for the imports; a warning that is shown is an error."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.chdir(self.path), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(arguments)
        return Result(code, out.getvalue(), err.getvalue())

    def run(self, name: str) -> Path:
        """A run folder."""
        return self.path / "runs" / name

    def contents(self, name: str) -> dict[str, Any]:
        """What two equal runs share to the bit: metrics without timings, rollouts, the model, names of files."""
        return contents(self.run(name))

    def metrics(self, name: str) -> list[dict[str, str]]:
        """Rows of metrics.csv without timings, which no two runs share."""
        with (self.run(name) / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        timings = ("seconds", "tokens_per_second")
        return [{key: value for key, value in row.items() if not key.endswith(timings)} for row in rows]


def is_gone(group: int) -> bool:
    """Whether all processes of a group are gone, a few seconds after the first one ended."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False
