"""Kills runs at random moments, starts them again, and compares with a run that was never killed: bit for bit.

    python -m benchmarks.kill_and_resume --runs 20                      # one process
    python -m benchmarks.kill_and_resume --runs 5 --strategy ddp        # two processes; or fsdp2

A run is a cold start's model and six steps of `fit` in a world of thirty entities, with a checkpoint each second step
and two validations; it packs its rollouts four times. Each is killed once or twice, by SIGKILL: at any time, while a
checkpoint is written, while `last.ckpt` is moved, while rollouts are packed, or in the middle of them; all processes at
once, or one of them, which the others have to notice. Then the same command goes on to the end. Compared are
metrics.csv without timings, every trajectories file and the model; nothing may be left over, no draft and no process.
Exit code 1 tells that some run differed.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce, wraps
from importlib import import_module
from pathlib import Path
from typing import Any

from sdsearch_lightning.__main__ import end_process

DATA = """\
data:
  class_path: SyntheticWorldDataModule
  init_args: {num_entities: 30, num_relations: 4, facts_per_entity: 4, num_train_questions: 20, num_val_questions: 4,
              num_demonstrations: 96, num_demonstration_worlds: 2, batch_size: 4, cache_dir: cache}
"""
TRAINER = "accelerator: cpu, enable_progress_bar: false"
COLD_START = f"""{DATA}
run: {{name: cold, checkpoint_every: 50}}
trainer: {{max_steps: 24, {TRAINER}}}
model:
  protocol: autorefine
  scratch: {{options: {{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64}}}}
  optimizers: [{{optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.003}}}}}}]
"""
FIT = f"""{DATA}
run: {{name: whole, checkpoint_every: 2}}
trainer: {{max_steps: 6, val_check_interval: 3, check_val_every_n_epoch: null, {TRAINER},
          callbacks: [{{class_path: TrajectoryLog, init_args: {{segment_mb: 0.04}}}}]}}
model:
  model_name_or_path: runs/cold/model
  protocol: autorefine
  optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.001}}}}
rollout: {{group_size: 3, top_k: 2, max_searches: 2, max_turn_tokens: 8, max_observation_tokens: 16, max_tokens: 200,
          eval_samples: 1}}
jsd: {{warmup_steps: 1, weight: 0.1}}
"""
TARGETS = {
    "save": ("sdsearch_lightning.callbacks.run_checkpoint:save", 3),
    "publish": ("sdsearch_lightning.callbacks.run_checkpoint:RunCheckpoint.publish", 6),
    "rollouts": ("sdsearch_lightning.rollout.groups:GroupSampler.run", 9),
    "pack": ("sdsearch_lightning.callbacks.trajectory_log:close_segment", 4),
}
"""Functions inside which a run is killed, and how often a whole run calls them."""
TIMINGS = ("seconds", "tokens_per_second")
OTHERS = ("validate", "test", "predict")  # folders beside a run's own files, by the commands that wrote them
LIMIT = 240.0
"""Seconds after which a run hangs, where nothing else is busy."""


@dataclass(frozen=True)
class Kill:
    """When a run is killed: `delay` seconds into the `call`-th call of a function, or after its start."""

    target: str
    """A key of TARGETS, or "time"."""
    call: int
    delay: float
    whole_group: bool = True
    """False: the last rank alone."""

    @staticmethod
    def draw(dice: random.Random, seconds: float, processes: int, only_time: bool) -> Kill:
        """Any moment in which a run of so many seconds does something."""
        target = "time" if only_time else dice.choice(["time", *TARGETS])
        whole_group = processes == 1 or dice.random() < 0.7
        if target == "time":  # the first third is imports
            return Kill(target, 0, dice.uniform(seconds / 3, seconds), whole_group)
        return Kill(target, dice.randint(1, TARGETS[target][1]), 10 ** dice.uniform(-4, -1), whole_group)

    def __str__(self) -> str:
        where = f"at {self.delay:.1f} s" if self.target == "time" else f"{self.target} {self.call} +{self.delay:.4f} s"
        return where if self.whole_group else f"{where}, one rank"


@dataclass
class Arena:
    """A folder with the two configurations, in which runs are started and killed."""

    path: Path
    strategy: str | None
    seconds: float = 0.0
    """That the whole run took."""
    whole: dict[str, Any] = field(default_factory=dict)
    """What it left."""
    limit: float = LIMIT
    """Seconds after which a run hangs."""

    @property
    def fit(self) -> list[str]:
        """Arguments of the run, without its name."""
        several = ["--trainer.strategy", self.strategy, "--trainer.devices", "2"] if self.strategy else []
        return ["fit", "--config", "fit.yaml", *several, *(["--data.batch_size", "2"] if self.strategy else [])]

    def write(self) -> None:
        """The two configurations, cold.yaml and fit.yaml."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "cold.yaml").write_text(COLD_START)
        (self.path / "fit.yaml").write_text(FIT)

    def prepare(self) -> None:
        """The model of the cold start and the run that is never killed."""
        self.write()
        self.start(["supervise", "--config", "cold.yaml"], check=True)
        started = time.monotonic()
        self.start([*self.fit, "--run.name", "whole", "--run.overwrite", "true"], check=True)
        self.seconds, self.whole = time.monotonic() - started, contents(self.path / "runs" / "whole")

    def start(self, command: Sequence[str], kill: Kill | None = None, check: bool = False) -> bool:
        """Runs a command to its end, natural or not; whether that was the natural one."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path.cwd())}
        victim = [] if kill is None or kill.target == "time" else [TARGETS[kill.target][0], *_words(kill)]
        module = ["benchmarks.kill_and_resume", "--victim", *victim, "--"] if victim else ["sdsearch_lightning"]
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *module, *command], cwd=self.path, env=environment, stdout=output,
                stderr=output, start_new_session=True,
            )  # fmt: skip
            if kill is not None and kill.target == "time":
                _wait(process, kill.delay)
                _kill(process.pid, kill.whole_group)
            if not _wait(process, self.limit):
                os.killpg(process.pid, signal.SIGKILL)
                raise SystemExit(f"{' '.join(command)} hangs after {kill}: no end in {self.limit:.0f} s")
            is_left = _wait_for_group(process.pid)
            output.seek(0)
            told = output.read()
        if is_left:
            raise SystemExit(f"{' '.join(command)} left processes behind after {kill}:\n{told}")
        if check and process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{told}")
        return process.returncode == 0

    def trial(self, name: str, kills: Sequence[Kill]) -> tuple[int, list[str]]:
        """Kills a run as told and finishes it: how many kills came in time, and what differs from the whole run."""
        command = [*self.fit, "--run.name", name]
        hits = sum(not self.start(command, kill) for kill in kills)
        self.start(command, check=True)
        return hits, differences(contents(self.path / "runs" / name), self.whole)


def contents(folder: Path) -> dict[str, Any]:
    """What is compared of a run folder: hashes by file name, and the names of checkpoints."""
    files = [*folder.glob("trajectories*.jsonl*"), *(folder / "model").glob("*.safetensors")]
    found: dict[str, Any] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found["metrics.csv"] = [{k: v for k, v in row.items() if not k.endswith(TIMINGS)} for row in rows]
    paths = [p for p in (*folder.iterdir(), *folder.glob("checkpoints/*")) if p.suffix != ".lock"]
    found["file names"] = sorted(str(p.relative_to(folder)) for p in paths if p.name not in OTHERS)
    return found


def differences(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """Names of what is not equal."""
    return sorted(key for key in left | right if left.get(key) != right.get(key))


def _words(kill: Kill) -> list[str]:
    return [str(kill.call), str(kill.delay), str(int(kill.whole_group))]


def _wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _kill(leader: int, whole_group: bool) -> None:
    """All processes of a group, or the one of the last rank."""
    children = subprocess.run(["pgrep", "-P", str(leader)], capture_output=True, text=True).stdout.split()
    try:
        if whole_group or not children:
            os.killpg(leader, signal.SIGKILL)
        else:
            os.kill(int(children[-1]), signal.SIGKILL)
    except ProcessLookupError:
        pass  # it was faster


def _wait_for_group(leader: int, seconds: float = 20.0) -> bool:
    """Whether a process of the group is still there after so long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(leader, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    os.killpg(leader, signal.SIGKILL)
    return True


def victim(target: str, call: str, delay: str, whole_group: str, *argv: str) -> int:
    """The command line, killed `delay` seconds into the `call`-th call of the function `target`."""
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner: Any = reduce(getattr, owners, import_module(module))
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0
    is_rank_0 = os.environ.get("LOCAL_RANK", "0") == "0"

    def die() -> None:
        if whole_group == "1":
            os.killpg(0, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    @wraps(original)
    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == int(call) and is_rank_0 == (whole_group == "1"):
            threading.Timer(float(delay), die).start()
        return original(*args, **kwargs)

    setattr(owner, name, deadly)
    from sdsearch_lightning.__main__ import main as command_line

    return command_line(argv)


def main() -> int:
    """Prints one line per run and a verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--strategy", choices=["ddp", "fsdp2"])
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds after which a run hangs")
    parser.add_argument("--folder", type=Path, help="where the runs stay; a temporary folder by default")
    options = parser.parse_args()
    equal, hit, dice = 0, 0, random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        arena = Arena(options.folder or Path(temporary), options.strategy, limit=options.limit)
        arena.prepare()
        print(f"whole run: {arena.seconds:.1f} s, {options.strategy or 'one process'}", flush=True)
        for number in range(1, options.runs + 1):
            kills = [Kill.draw(dice, arena.seconds, 2 if options.strategy else 1, only_time=number % 2 == 0)]
            if dice.random() < 0.4:
                kills.append(Kill.draw(dice, arena.seconds, 2 if options.strategy else 1, only_time=True))
            started = time.monotonic()
            hits, different = arena.trial(f"trial{number}", kills)
            equal, hit = equal + (not different), hit + bool(hits)
            told = f"DIFFERENT: {', '.join(different)}" if different else "equal"
            moments = "; ".join(map(str, kills)) + ("" if hits == len(kills) else f" ({len(kills) - hits} too late)")
            print(f"run {number:3}  {moments:50}  {time.monotonic() - started:5.1f} s  {told}", flush=True)
    print(f"{hit} of {options.runs} runs were killed in time; {equal} of {options.runs} equal the one that never was")
    return 0 if equal == options.runs else 1


if __name__ == "__main__":
    end_process(victim(*sys.argv[2:6], *sys.argv[7:]) if "--victim" in sys.argv[1:2] else main())
