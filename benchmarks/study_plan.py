"""The plan of `make study-core`: arms, grids, seeds, and the command behind each run.

Invariant: a run is one plain command of the library's command line and one line of results.jsonl.
Next: study_core.py, which runs the plan, and study_table.py, which tells the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from benchmarks.measures import measure
from benchmarks.runner import Record

QUICKSTART = "configs/quickstart"
PRESETS = "configs/experiment/study_core"
CONTROL = "grpo"

Stage = Literal["cold_start", "tuning", "comparison"]


@dataclass(frozen=True, slots=True)
class Arm:
    """One of the methods that are compared."""

    name: str
    """Also that of its file in `PRESETS`."""
    title: str
    weight_key: str
    """The key of its one weight of its own."""
    weights: tuple[float, ...]
    """The grid of that weight."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a study."""

    stage: Stage
    arm: str
    seed: int
    lr: float | None = None
    weight: float | None = None

    @property
    def name(self) -> str:
        """Its folder below the study's."""
        if self.is_cold_start:
            return "cold_start"
        return f"{self.stage}/{self.arm}-lr{self.lr:g}-weight{self.weight:g}-seed{self.seed}"

    @property
    def is_cold_start(self) -> bool:
        """Whether the others start from its model."""
        return self.stage == "cold_start"


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a study does; the cold start and the world are those of seed 0."""

    arms: tuple[Arm, ...]
    """The control first: its learning rate is chosen first, and is then that of all arms."""
    rates: tuple[float, ...]
    """The grid of the learning rate."""
    tuning_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    """Of the comparison; none of the tuning seeds."""
    max_steps: int
    cold_start_overrides: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()

    @property
    def control(self) -> Arm:
        """The arm that the others are compared with."""
        return self.arms[0]

    def rate_runs(self) -> list[Run]:
        """Choosing the learning rate, for the control."""
        (weight,) = self.control.weights
        return [Run("tuning", self.control.name, s, lr, weight) for lr in self.rates for s in self.tuning_seeds]

    def weight_runs(self, lr: float) -> list[Run]:
        """Choosing the weight of every other arm, at the learning rate chosen for the control."""
        return [
            Run("tuning", arm.name, seed, lr, weight)
            for arm in self.arms[1:]
            for weight in arm.weights
            for seed in self.tuning_seeds
        ]

    def comparison_runs(self, lr: float, weights: Sequence[float]) -> list[Run]:
        """The comparison, seed by seed: paired runs are neighbours in time, and share the load of the machine."""
        pairs = list(zip(self.arms, weights, strict=True))
        return [Run("comparison", arm.name, seed, lr, weight) for seed in self.seeds for arm, weight in pairs]

    @property
    def num_runs(self) -> int:
        """Runs of the whole study, the cold start included."""
        tuning = len(self.rates) + sum(len(arm.weights) for arm in self.arms[1:])
        return 1 + tuning * len(self.tuning_seeds) + len(self.arms) * len(self.seeds)

    def arguments(self, run: Run, root: str) -> list[str]:
        """The arguments of `python -m sdsearch_lightning` for a run."""
        # Overwritten, not resumed: a run that was cut off is done again whole, or its seconds would be of a part.
        seed = f"--seed_everything={run.seed}"
        place = (f"--run.root={root}", f"--run.name={run.name}", "--run.overwrite=true")
        if run.is_cold_start:
            return ["supervise", f"--config={QUICKSTART}_cold_start.yaml", seed, *place, *self.cold_start_overrides]
        (arm,) = (arm for arm in self.arms if arm.name == run.arm)
        files = (f"{QUICKSTART}.yaml", f"{PRESETS}/common.yaml", f"{PRESETS}/{arm.name}.yaml")
        return [
            "fit",
            *(f"--config={file}" for file in files),
            seed,
            *place,
            f"--model.model_name_or_path={root}/{COLD_START.name}/model",
            f"--model.optimizer.init_args.lr={run.lr:g}",
            f"--{arm.weight_key}={run.weight:g}",
            *self.overrides,
        ]

    def measure(self, run: Run, folder: Path) -> Record:
        """What the line of a run that ended well tells of it.

        Raises:
            SDSearchError: it was not evaluated from its start to its end.
        """
        return {"measures": {} if run.is_cold_start else measure(folder, self.max_steps)}


COLD_START = Run("cold_start", "cold_start", 0)

FULL = Plan(
    arms=(
        Arm(CONTROL, "GRPO", "jsd.weight", (0.0,)),
        Arm("entropy_penalty", "GRPO + entropy penalty", "model.entropy_coef.query", (-0.02, -0.05, -0.1)),
        Arm("sd_all", "SD-Search, all groups", "jsd.weight", (0.1, 0.3)),
        Arm("sd_mixed", "SD-Search, mixed groups", "jsd.weight", (0.1, 0.3, 1.0)),
    ),
    rates=(5e-4, 7e-4, 1e-3, 1.4e-3),
    tuning_seeds=(100, 101),
    seeds=(0, 1, 2, 3),
    max_steps=40,
)

SMOKE = Plan(
    arms=tuple(replace(arm, weights=arm.weights[:1]) for arm in FULL.arms),
    rates=FULL.rates[:1],
    tuning_seeds=FULL.tuning_seeds[:1],
    seeds=FULL.seeds[:2],
    max_steps=2,
    cold_start_overrides=("--trainer.max_steps=2", "--trainer.log_every_n_steps=1"),
    overrides=(
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=1",
        "--jsd.warmup_steps=0",
        "--data.batch_size=4",
        "--data.num_val_questions=8",
    ),
)
"""The same stages, a few seconds each: shows that the study runs, and nothing else."""
