"""Tables and pictures of `make study`, from its results: docs/results_study.md below its mark, and docs/pictures.

python -m benchmarks.study_report [--results benchmarks/study/results.jsonl] [--docs docs]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.markdown import difference, header, number, row
from benchmarks.processes import ROOT
from benchmarks.runner import Record, read_records
from benchmarks.study import RESULTS
from benchmarks.study_pictures import ForestRow, color, curves_picture, forest_picture
from benchmarks.study_plan import Arm
from benchmarks.study_protocol import FULL, Family, Records, Run
from benchmarks.study_statistics import (
    PRIMARY,
    SMOOTHED_STEPS,
    Comparison,
    Measured,
    compare,
    holm,
    measures_of,
    ratio,
)
from sdsearch_lightning.files import write_text
from sdsearch_lightning.report.charts import Curve
from sdsearch_lightning.report.metrics import Point

MARK = "<!-- Below this line: python -m benchmarks.study_report. Do not edit. -->"
HEAD = "# Results of the study\n\nThe protocol is study.md.\n\n"
"""Of a new page; what is above the mark is written by hand and kept."""
CONTROL, SHARPENING = "grpo", "entropy_penalty"
PICTURES = {
    "study_curves.svg": "Train EM over the steps, mean over runs",
    "study_forest.svg": "Differences to GRPO with 95 % intervals",
}
TWINS = (("sd", "sd_shuffled"), ("evidence_credit", "evidence_reward"))
"""Labels that say nothing; the same evidence in the reward."""
TITLES = {"train_area": "area, train EM", "sampled_area": "area, sampled EM"}
TWIN_TITLES = TITLES | {"final_greedy": "final greedy EM"}


def render(records: Records) -> str:
    """All tables as Markdown."""
    shown = [f"![{text}](pictures/{name})" for name, text in PICTURES.items()]
    parts = [*shown, *(line for family in FULL.families for line in _family(family, records))]
    return "\n".join([*parts, *_origin(records)]) + "\n"


def measured_runs(family: Family, records: Records) -> Measured:
    """Measures of the report runs of a family that ended well."""
    return {run: measures_of(record) for run, record in _report(family, records).items() if record["status"] == "ok"}


def _report(family: Family, records: Records) -> Records:
    """Report runs of a family; where tuning was done again and chose otherwise, those of its choice alone."""
    chosen = {arm.name: FULL.tuning(family, arm, records).chosen for arm in FULL.arms}
    return {
        run: record
        for run, record in records.items()
        if run.family == family.name and run.phase == "report" and chosen.get(run.arm) in (None, (run.lr, run.weight))
    }


def _arms(measured: Measured) -> list[Arm]:
    names = {run.arm for run in measured}
    return [arm for arm in FULL.arms if arm.name in names]


def comparisons(measured: Measured, control: str, name: str) -> dict[str, Comparison]:
    """Every other arm against `control`, by arm."""
    found = {arm.name: compare(measured, arm.name, control, name) for arm in _arms(measured) if arm.name != control}
    return {arm: comparison for arm, comparison in found.items() if comparison is not None}


def _family(family: Family, records: Records) -> Iterator[str]:
    measured = measured_runs(family, records)
    if not measured:
        return
    yield f"\n## Family {family.name}, {family.num_steps} steps\n"
    yield from _settings(measured)
    for control in (CONTROL, SHARPENING):
        yield from _primary(measured, control)
    yield from _twins(measured)
    yield from _others(measured)
    yield from _compute(measured, _report(family, records))
    yield from _tuning(family, records)


def _settings(measured: Measured) -> Iterator[str]:
    yield from header(["arm", "lr", "weight", "runs", *TITLES.values(), "query entropy"])
    for arm in _arms(measured):
        runs = _of(measured, arm)
        first = next(iter(runs))
        means = [number(_mean(runs, name), 3) for name in (*TITLES, "query_entropy")]
        yield row([arm.title, f"{first.lr:g}", f"{first.weight:g}", str(len(runs)), *means])


def _primary(measured: Measured, control: str) -> Iterator[str]:
    found = {name: comparisons(measured, control, name) for name in PRIMARY}
    corrected = {name: holm({arm: own.p for arm, own in rows.items()}) for name, rows in found.items()}
    title = next(arm.title for arm in FULL.arms if arm.name == control)
    yield f"\nMinus {title}: mean of paired differences, 95 % t interval; p of sign flips, and by Holm over the arms.\n"
    yield from header(["arm", "pairs", *(cell for text in TITLES.values() for cell in (text, "p", "Holm"))])
    for arm in _arms(measured):
        if arm.name in found[PRIMARY[0]]:
            own = {name: rows[arm.name] for name, rows in found.items()}
            cells = [
                cell
                for name, comparison in own.items()
                for cell in (
                    difference(comparison.difference, 3),
                    number(comparison.p, 4),
                    number(corrected[name][arm.name], 4),
                )
            ]
            yield row([arm.title, str(own[PRIMARY[0]].difference.n), *cells])


def _twins(measured: Measured) -> Iterator[str]:
    """Arms against the one that shares all but their idea."""
    titles = {arm.name: arm.title for arm in _arms(measured)}
    shown = [pair for pair in TWINS if titles.keys() >= {*pair}]
    if not shown:
        return
    yield "\nWith the idea taken out, or put elsewhere: paired differences, 95 % t interval; p of sign flips.\n"
    yield from header(["arm", "minus", "pairs", *(cell for text in TWIN_TITLES.values() for cell in (text, "p"))])
    for arm, other in shown:
        found = [compare(measured, arm, other, name) for name in TWIN_TITLES]
        cells = [
            cell
            for each in found
            for cell in (("-", "-") if each is None else (difference(each.difference, 3), number(each.p, 4)))
        ]
        pairs = next((str(each.difference.n) for each in found if each is not None), "0")
        yield row([titles[arm], titles[other], pairs, *cells])


def _others(measured: Measured) -> Iterator[str]:
    yield "\nCo-primary measures; in brackets minus GRPO, paired.\n"
    yield from header(["arm", "steps to EM .5", "rollouts to it, ratio to GRPO", "final greedy EM", "collapsed"])
    for arm in _arms(measured):
        runs = _of(measured, arm)
        steps, greedy = (
            f"{number(_mean(runs, name), digits)}{_bracket(measured, arm, name, digits)}"
            for name, digits in (("steps_to_half", 1), ("final_greedy", 3))
        )
        collapsed = sum(values["collapsed"] for values in runs.values())
        rollouts = number(ratio(measured, arm.name, CONTROL, "steps_to_half"), 2)
        yield row([arm.title, steps, rollouts, greedy, f"{collapsed:.0f} of {len(runs)}"])


def _bracket(measured: Measured, arm: Arm, name: str, digits: int) -> str:
    found = None if arm.name == CONTROL else compare(measured, arm.name, CONTROL, name)
    return f" ({difference(found.difference, digits)})" if found else ""


def _compute(measured: Measured, report: Records) -> Iterator[str]:
    yield "\nEqual compute: train EM at the step that an arm has reached when GRPO has used all its CPU seconds.\n"
    yield from header(["arm", "CPU s", "ratio to GRPO", "train EM then"])
    for arm in _arms(measured):
        runs = _of(measured, arm)
        share = ratio(measured, arm.name, CONTROL, "cpu_seconds")
        then = None if share is None else fmean(_em_at(report[run], max(1.0, share)) for run in runs)
        yield row([arm.title, number(_mean(runs, "cpu_seconds"), 1), number(share, 2), number(then, 3)])


def _of(measured: Measured, arm: Arm) -> Measured:
    return {run: values for run, values in measured.items() if run.arm == arm.name}


def _mean(runs: Measured, name: str) -> float | None:
    values = [measures[name] for measures in runs.values() if name in measures]
    return fmean(values) if values else None


def _em_at(record: Record, ratio: float) -> float:
    """Train EM, over a few steps, when as much is computed as the control computes in all its steps."""
    last = max(SMOOTHED_STEPS, int(record["steps"] / ratio))
    return fmean(record["train_em"][last - SMOOTHED_STEPS : last])


def _tuning(family: Family, records: Records) -> Iterator[str]:
    yield "\nTuning, mean area under train EM; without settings that failed on a seed.\n"
    yield from header(["arm", "lr", "weight", "area", ""])
    for arm in FULL.arms:
        tuning = FULL.tuning(family, arm, records)
        for setting in tuning.settings:
            area = FULL.area(family, arm, setting, records)
            if area is not None:
                verdict = "chosen" if setting == tuning.chosen else ""
                yield row([arm.title, f"{setting[0]:g}", f"{setting[1]:g}", number(area, 3), verdict])


def _origin(records: Records) -> Iterator[str]:
    failed = [record for record in records.values() if record["status"] != "ok"]
    yield f"\n## Origin\n\nFailed runs: {len(failed) or 'none'}."
    for record in failed:
        yield from (f"\n`{record['command']}` ended with:\n", "```", *record["last_lines"], "```")
    dates = sorted(record["date"] for record in records.values())
    hours = sum(record["cpu_seconds"] for record in records.values()) / 3600
    commits = ", ".join(dict.fromkeys(record["commit"] for record in records.values()))
    yield f"\n{len(records)} runs, {hours:.1f} hours of CPU, {dates[0]} to {dates[-1]}, code {commits}."


def pictures(records: Records) -> dict[str, str]:
    """SVG texts by file name."""
    families = [family for family in FULL.families if measured_runs(family, records)]
    panels = [(f"{family.name}: train EM", _curves(family, records)) for family in families]
    rows = []
    for family in families:
        measured = measured_runs(family, records)
        found = [comparisons(measured, CONTROL, name) for name in PRIMARY]
        for index, arm in enumerate(FULL.arms):
            own = [of_measure[arm.name].difference if arm.name in of_measure else None for of_measure in found]
            if any(own):
                rows.append(ForestRow(f"{family.name}: {arm.title}", color(index), own))
    drawn = (curves_picture(panels), forest_picture([f"{text}, minus GRPO" for text in TITLES.values()], rows))
    return dict(zip(PICTURES, drawn, strict=True))


def _curves(family: Family, records: Records) -> list[Curve]:
    curves = []
    for index, arm in enumerate(FULL.arms):
        report = _report(family, records)
        runs = [r["train_em"] for run, r in report.items() if run.arm == arm.name and r["status"] == "ok"]
        points = [Point(step, fmean(values)) for step, values in enumerate(zip(*runs, strict=True), start=1)]
        if points:
            curves.append(Curve(arm.title, points, color(index)))
    return curves


def main(argv: Sequence[str] | None = None) -> int:
    """Writes page and pictures; returns 0, or 1 where no run of the report has ended well."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study_report", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="lines that `make study` wrote")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of results_study.md and pictures/")
    options = parser.parse_args(argv)
    records = read_records(options.results, Run) if options.results.is_file() else {}
    if not any(run.phase == "report" and record["status"] == "ok" for run, record in records.items()):
        print(f"error: expected report runs that ended well in {options.results}, found none. Run make study first.")
        return 1
    page = options.docs / "results_study.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else HEAD
    write_text(page, text.split(MARK)[0] + MARK + "\n" + render(records))
    (options.docs / "pictures").mkdir(exist_ok=True)
    for name, picture in pictures(records).items():
        write_text(options.docs / "pictures" / name, picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
