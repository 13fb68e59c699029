"""The protocol of `make study` as data: families of worlds, arms, seeds, how settings are tuned, the command of a run.

Invariant: what is wanted follows from the records alone, so that any number of workers agree on it without talking.
docs/study.md says it in words; study.py does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Literal

from benchmarks.measures import mean, training_curves
from benchmarks.runner import Record
from benchmarks.study_plan import QUICKSTART, Arm

WORLDS, PRESETS = "configs/experiment/world", "configs/experiment/study"
RATE_STEP = 2**0.25
"""An arm with a weight is tuned at GRPO's learning rate times and divided by this."""

Phase = Literal["cold_start", "tuning", "report"]
Setting = tuple[float, float]
"""Learning rate and weight."""


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of world, one for each world seed."""

    name: str
    num_steps: int
    cold_start: str
    """The family whose cold start serves: one with the same demonstrations."""
    files: tuple[str, ...]
    """Of `WORLDS`, for `fit`."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the study."""

    family: str
    arm: str
    world_seed: int
    seed: int
    phase: Phase
    lr: float | None = None
    weight: float | None = None

    @property
    def name(self) -> str:
        """Its folder below the study's."""
        if self.is_cold_start:
            return f"cold_start/{self.family}-world{self.world_seed}"
        setting = f"lr{self.lr:g}-weight{self.weight:g}-world{self.world_seed}-seed{self.seed}"
        return f"{self.phase}/{self.family}-{self.arm}-{setting}"

    @property
    def is_cold_start(self) -> bool:
        """Whether others start from its model."""
        return self.phase == "cold_start"


@dataclass(frozen=True, slots=True)
class Tuning:
    """How far the search for the setting of an arm has come."""

    settings: tuple[Setting, ...]
    """Those to be tried, as far as that is known."""
    chosen: Setting | None
    """None until all are tried, and where each of them failed on a seed."""


Records = Mapping[Run, Record]


@dataclass(frozen=True, slots=True)
class Protocol:
    """All that the study does."""

    families: tuple[Family, ...]
    arms: tuple[Arm, ...]
    """The control first: the learning rates of the others lie around its own."""
    rates: tuple[float, ...]
    allowance: int
    """Settings that may be added to a grid whose best lies at an edge."""
    tuning_seeds: tuple[int, ...]
    """Of world seed 0; none of `seeds`."""
    world_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    """Of the report, on each world."""
    overrides: tuple[str, ...] = ()
    cold_start_overrides: tuple[str, ...] = ()

    @property
    def control(self) -> Arm:
        """The arm that the others are compared with."""
        return self.arms[0]

    def wanted(self, records: Records, has_succeeded: Callable[[Run], bool]) -> Iterator[Run]:
        """Every run that can be named by now and can start, in the order in which to do them.

        Args:
            records: the results so far.
            has_succeeded: whether the model of a cold start is there.
        """
        for family in self.families:
            starts = {world: self.cold_start(family, world) for world in self.world_seeds}
            yield from starts.values()
            runs = (*self.tuning_runs(family, records), *self.report_runs(family, records))
            yield from (run for run in runs if has_succeeded(starts[run.world_seed]))

    def cold_start(self, family: Family, world_seed: int) -> Run:
        """What the runs of a world start from."""
        return Run(family.cold_start, "cold_start", world_seed, world_seed, "cold_start")

    def tuning_runs(self, family: Family, records: Records) -> Iterator[Run]:
        """Those of the control, then those of the other arms once its learning rate is chosen."""
        for arm in self.arms:
            for lr, weight in self.tuning(family, arm, records).settings:
                yield from self._setting_runs(family, arm, (lr, weight))

    def report_runs(self, family: Family, records: Records) -> Iterator[Run]:
        """Every arm whose setting is chosen, on the same worlds and seeds."""
        settings = {arm.name: self.tuning(family, arm, records).chosen for arm in self.arms}
        for world_seed in self.world_seeds:
            for seed in self.seeds:
                for name, setting in settings.items():
                    if setting is not None:
                        yield Run(family.name, name, world_seed, seed, "report", *setting)

    def tuning(self, family: Family, arm: Arm, records: Records) -> Tuning:
        """The search for the setting of `arm`: a grid, and a few settings more while the best lies at an edge."""
        rates = self.rates
        if len(arm.weights) > 1:
            best = self.tuning(family, self.control, records).chosen
            if best is None:
                return Tuning((), None)
            rates = (_rounded(best[0] / RATE_STEP), _rounded(best[0] * RATE_STEP))
        settings = [(lr, weight) for lr in rates for weight in arm.weights]
        num_settings = len(settings) + self.allowance
        while True:
            if not all(run in records for s in settings for run in self._setting_runs(family, arm, s)):
                return Tuning(tuple(settings), None)
            areas = {setting: self.area(family, arm, setting, records) for setting in settings}
            known = {setting: area for setting, area in areas.items() if area is not None}
            if not known:
                return Tuning(tuple(settings), None)
            chosen = max(known, key=known.__getitem__)
            more = beyond(settings, chosen)
            if more is None or len(settings) == num_settings:
                return Tuning(tuple(settings), chosen)
            settings.append(more)

    def _setting_runs(self, family: Family, arm: Arm, setting: Setting) -> list[Run]:
        world = self.world_seeds[0]
        return [Run(family.name, arm.name, world, seed, "tuning", *setting) for seed in self.tuning_seeds]

    def area(self, family: Family, arm: Arm, setting: Setting, records: Records) -> float | None:
        """Mean area under train EM; None where a seed failed: the others' mean would be of other seeds."""
        found = [records.get(run) for run in self._setting_runs(family, arm, setting)]
        return mean([fmean(record["train_em"]) if record and record["status"] == "ok" else None for record in found])

    def arguments(self, run: Run, root: str) -> list[str]:
        """The arguments of `python -m sdsearch_lightning` for a run."""
        # Overwritten, not resumed: a run that was cut off is done again whole, or its seconds would be of a part.
        seeds = (f"--seed_everything={run.seed}", f"--data.world_seed={run.world_seed}")
        place = (f"--run.root={root}", f"--run.name={run.name}", "--run.overwrite=true")
        if run.is_cold_start:
            start = ["supervise", f"--config={QUICKSTART}_cold_start.yaml", f"--config={WORLDS}/{run.family}.yaml"]
            return [*start, *seeds, *place, *self.cold_start_overrides]
        (family,) = (family for family in self.families if family.name == run.family)
        (arm,) = (arm for arm in self.arms if arm.name == run.arm)
        worlds = (f"{WORLDS}/{name}.yaml" for name in family.files)
        files = (f"{QUICKSTART}.yaml", *worlds, f"{PRESETS}/common.yaml", f"{PRESETS}/{arm.name}.yaml")
        return [
            "fit",
            *(f"--config={file}" for file in files),
            *seeds,
            *place,
            f"--model.model_name_or_path={root}/{self.cold_start(family, run.world_seed).name}/model",
            f"--model.optimizer.init_args.lr={run.lr:g}",
            f"--{arm.weight_key}={run.weight:g}",
            f"--trainer.max_steps={family.num_steps}",
            *self.overrides,
        ]

    def measure(self, run: Run, folder: Path) -> Record:
        """What the line of a run that ended well tells of it.

        Raises:
            SDSearchError: a step or an evaluation is missing.
        """
        if run.is_cold_start:
            return {}
        (num_steps,) = (family.num_steps for family in self.families if family.name == run.family)
        return {"steps": num_steps} | training_curves(folder, num_steps)


def beyond(settings: Sequence[Setting], best: Setting) -> Setting | None:
    """The next setting past the edge of the grid at which `best` lies, weight before learning rate; None inside it."""
    for axis in (1, 0):
        line = sorted({setting[axis] for setting in settings if setting[1 - axis] == best[1 - axis]}, key=abs)
        if len(line) > 1 and best[axis] in (line[0], line[-1]):
            neighbour = line[1] if best[axis] == line[0] else line[-2]
            value = _rounded(best[axis] ** 2 / neighbour)
            return (best[0], value) if axis == 1 else (value, best[1])
    return None


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")


FULL = Protocol(
    families=(
        Family("sparse", 30, "dense", ("sparse",)),
        Family("dense", 40, "dense", ("dense",)),
        Family("long", 40, "long", ("long", "long_rollout")),
    ),
    arms=(
        Arm("grpo", "GRPO", "jsd.weight", (0.0,)),
        Arm("entropy_penalty", "GRPO + entropy penalty", "model.entropy_coef.query", (-0.02, -0.05, -0.1)),
        Arm("evidence_credit", "evidence credit", "credit.weight", (0.3, 1.0, 3.0)),
        Arm("sd", "SD-Search", "jsd.weight", (0.1, 0.3, 1.0)),
        Arm("evidence_reward", "evidence reward", "rollout.reward.init_args.share", (0.03, 0.1, 0.3)),
        Arm("sd_shuffled", "SD-Search, labels shuffled", "jsd.weight", (0.1, 0.3, 1.0)),
        Arm("sd_all", "SD-Search, all groups", "jsd.weight", (0.1, 0.3, 1.0)),
        Arm("dapo", "DAPO", "jsd.weight", (0.0,)),
        Arm("information_gain", "information gain", "credit.weight", (0.1, 0.3, 1.0)),
        Arm("rlsd", "RLSD", "model.teacher_use.init_args.mix", (0.25, 0.5, 1.0)),
        Arm("sdar", "SDAR", "jsd.weight", (0.1, 0.3, 1.0)),
    ),
    rates=(3.5e-4, 5e-4, 7e-4, 1e-3, 1.4e-3, 2e-3),
    allowance=2,
    tuning_seeds=(0, 1),
    world_seeds=(0, 1, 2),
    seeds=(100, 101, 102, 103),
)

SMOKE = replace(
    FULL,
    families=tuple(replace(family, num_steps=2) for family in FULL.families),
    arms=tuple(replace(arm, weights=arm.weights[:2]) for arm in FULL.arms),
    rates=FULL.rates[:1],
    allowance=0,
    tuning_seeds=(0,),
    world_seeds=(0,),
    seeds=(100,),
    cold_start_overrides=("--trainer.max_steps=2", "--trainer.log_every_n_steps=1"),
    overrides=(
        "--trainer.val_check_interval=1",
        "--jsd.warmup_steps=0",
        "--data.batch_size=4",
        "--data.num_val_questions=8",
    ),
)
"""The same stages, a few seconds each: shows that the study runs, and nothing else."""
