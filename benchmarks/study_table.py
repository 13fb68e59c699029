"""The result of `make study-core` as Markdown: what it can tell, the table, every pair, and how it was made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

from benchmarks.markdown import difference, header, number, row
from benchmarks.measures import HALF, LAST_STEPS, mean, paired_difference
from benchmarks.runner import Record
from benchmarks.study_plan import Arm, Plan, Run

COLUMNS = {
    "sampled_area": ("area, sampled EM", 3),
    "greedy_area": ("area, greedy EM", 3),
    "sampled_end": ("final sampled EM", 3),
    "greedy_end": ("final greedy EM", 3),
    "steps_to_half": (f"steps to sampled EM {HALF}", 1),
    "query_entropy": ("query entropy", 3),
    "cpu_seconds": ("CPU s", 1),
    "wall_seconds": ("wall s", 1),
}
"""Measure: heading and digits."""

Records = Mapping[Run, Record]


def render(records: Records, runs: Sequence[Run], plan: Plan) -> str:
    """The whole text.

    Args:
        records: results by their run.
        runs: the runs that the study came to; those without a record were not done.
        plan: what was to be done.
    """
    compared = [run for run in runs if run.stage == "comparison"]
    parts = [
        _opening(plan),
        _arms(records, compared, plan),
        _pairs(records, compared, plan),
        _runs(records, compared, plan),
        _tuning(records, runs, plan),
        _failures(records, runs),
        _origin(records, runs),
    ]
    return "\n".join(chain.from_iterable(parts))


def value_of(record: Record | None, measure: str) -> float | None:
    """A measure of a run; None where the run is missing, failed or did not measure it."""
    if record is None or record["status"] != "ok":
        return None
    return (record["measures"] | {name: record[name] for name in ("cpu_seconds", "wall_seconds")}).get(measure)


def _opening(plan: Plan) -> Iterator[str]:
    n = len(plan.seeds)
    yield "## Study: GRPO, a sharpening control, SD-Search\n"
    yield (
        f"**A smoke test of the evidence, not evidence:** n = {n} paired seeds, one world, one cold start, one model "
        f"of 0.2M parameters. Even a difference of the same sign in all {n} pairs has a two-sided sign-test p of "
        f"{2 * 0.5**n:.3g}, and the intervals are not corrected for how many there are. They show the spread over "
        "seeds only: another world or cold start may turn the order round.\n"
    )
    yield (
        f"Areas are under the curve of held-out exact match (EM) over steps 0 to {plan.max_steps}, by the trapezoid "
        f"rule, divided by {plan.max_steps}. In brackets: mean of the differences to {plan.control.title} on the same "
        "seed, plus or minus half of its 95 % t interval. The steps to a level are read off a line between "
        f"evaluations. Query entropy (nats) is of the policy at query tokens of training rollouts, mean over the last "
        f"{LAST_STEPS} steps. Seconds are of the whole command: imports, evaluations and the report included. A dash: "
        "not measured, not reached, or a run that failed.\n"
    )


def _arms(records: Records, compared: Sequence[Run], plan: Plan) -> Iterator[str]:
    yield from header(["arm", "lr", "weight", "n", *(heading for heading, _ in COLUMNS.values())])
    controls = {run.seed: run for run in compared if run.arm == plan.control.name}
    for arm in plan.arms:
        runs = [run for run in compared if run.arm == arm.name and _is_ok(records, run)]
        cells = []
        for name, (_, digits) in COLUMNS.items():
            values = [value_of(records.get(run), name) for run in runs]
            cell = number(mean(values), digits)
            paired = [run for run in runs if _is_ok(records, controls[run.seed])]
            if arm is not plan.control and paired:
                own, others = (
                    [value_of(records.get(run), name) for run in side]
                    for side in (paired, [controls[run.seed] for run in paired])
                )
                if (found := paired_difference(own, others)) is not None:
                    cell += f" ({difference(found, digits)})"
            cells.append(cell)
        rate, weight = (f"{runs[0].lr:g}", f"{runs[0].weight:g}") if runs else ("–", "–")
        yield row([arm.title, rate, weight, str(len(runs)), *cells])


def _pairs(records: Records, compared: Sequence[Run], plan: Plan) -> Iterator[str]:
    yield f"\nEvery pair, arm minus {plan.control.title} of the same seed:\n"
    yield from header(["arm", "seed", *(heading for heading, _ in COLUMNS.values())])
    controls = {run.seed: run for run in compared if run.arm == plan.control.name}
    for arm in plan.arms[1:]:
        for run in (run for run in compared if run.arm == arm.name):
            cells = []
            for name, (_, digits) in COLUMNS.items():
                sides = [[value_of(records.get(side), name)] for side in (run, controls[run.seed])]
                cells.append(difference(paired_difference(*sides), digits))
            yield row([arm.title, str(run.seed), *cells])


def _runs(records: Records, compared: Sequence[Run], plan: Plan) -> Iterator[str]:
    yield "\nEvery run of the comparison:\n"
    yield from header(["arm", "seed", "sampled EM at step 0", *(heading for heading, _ in COLUMNS.values())])
    for arm in plan.arms:
        for run in (run for run in compared if run.arm == arm.name):
            record = records.get(run)
            cells = [number(value_of(record, name), digits) for name, (_, digits) in COLUMNS.items()]
            yield row([arm.title, str(run.seed), number(value_of(record, "sampled_start"), 3), *cells])
    starts: dict[int, set[float | None]] = {}
    for run in compared:
        starts.setdefault(run.seed, set()).add(value_of(records.get(run), "sampled_start"))
    differing = [str(seed) for seed, values in starts.items() if len(values - {None}) > 1]
    if differing:
        yield f"\n**Not paired:** the arms start from different sampled EM at seed {', '.join(differing)}."


def _tuning(records: Records, runs: Sequence[Run], plan: Plan) -> Iterator[str]:
    seeds = plan.tuning_seeds
    yield (
        f"\nTuning, area under sampled EM on seeds {', '.join(map(str, seeds))}, the learning rate on "
        f"{plan.control.title} alone. Chosen: the largest mean.\n"
    )
    yield from header(["arm", "lr", "weight", *(f"seed {seed}" for seed in seeds), "mean", ""])
    tuning = [run for run in runs if run.stage == "tuning"]
    chosen = {(run.arm, run.lr, run.weight) for run in runs if run.stage == "comparison"}
    for name, lr, weight in dict.fromkeys((run.arm, run.lr, run.weight) for run in tuning):
        arm = next(arm for arm in plan.arms if arm.name == name)
        values = [value_of(records.get(Run("tuning", name, s, lr, weight)), "sampled_area") for s in seeds]
        verdict = _verdict(arm, lr, weight, plan) if (name, lr, weight) in chosen else ""
        cells = [number(value, 3) for value in (*values, mean(values))]
        yield row([arm.title, f"{lr:g}", f"{weight:g}", *cells, verdict])


def _verdict(arm: Arm, lr: float | None, weight: float | None, plan: Plan) -> str:
    grid, value = (plan.rates, lr) if arm is plan.control else (arm.weights, weight)
    is_edge = len(grid) > 1 and value in (grid[0], grid[-1])
    return "chosen, at the edge of the grid" if is_edge else "chosen"


def _failures(records: Records, runs: Sequence[Run]) -> Iterator[str]:
    failed = [records[run] for run in runs if run in records and not _is_ok(records, run)]
    missing = [run.name for run in runs if run not in records]
    yield f"\nFailed runs: {len(failed) or 'none'}. Runs not done: {', '.join(missing) or 'none'}."
    for record in failed:
        yield f"\n`{record['command']}` ended with exit code {record['exit_code']}:\n"
        yield from ("```", *record["last_lines"], "```")


def _origin(records: Records, runs: Sequence[Run]) -> Iterator[str]:
    done = [records[run] for run in runs if run in records]
    dates = sorted(record["date"] for record in done)
    cpu, wall = (sum(record[name] for record in done) / 60 for name in ("cpu_seconds", "wall_seconds"))
    yield (
        f"\nMade {f'{dates[0]} to {dates[-1]}' if dates else 'never'}: {len(done)} runs, {cpu:.1f} minutes of CPU, "
        f"{wall:.1f} minutes of single runs added up."
    )
    for title, texts in (
        ("Code", [record["commit"] for record in done]),
        ("Versions", [", ".join(f"{k} {v}" for k, v in record["versions"].items()) for record in done]),
    ):
        different = list(dict.fromkeys(texts))
        mixed = " **(several: do not compare)**" if len(different) > 1 else ""
        yield f"\n{title}{mixed}: {'; '.join(different) or 'none'}."
    yield "\n`make study-core`, which printed and ran commands like these; results.jsonl holds all of them:\n\n```bash"
    # The last of each arm: in a finished study, of the comparison.
    yield from {record["arm"]: record["command"] for record in done}.values()
    yield "```\n"


def _is_ok(records: Records, run: Run) -> bool:
    return run in records and records[run]["status"] == "ok"
