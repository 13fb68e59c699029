"""The page of the study tells a planted effect and invents none. The runs are made up."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.runner import Record
from benchmarks.study_protocol import FULL, Run
from benchmarks.study_report import MARK, comparisons, main, measured_runs, pictures, render
from benchmarks.study_statistics import holm

GAIN = {"grpo": 0.0, "entropy_penalty": 0.0, "sd": 0.1}
"""Of train and sampled EM: planted in one arm alone."""
SPARSE = FULL.families[0]


def made_up(gain: dict[str, float], failed: Run | None = None) -> dict[Run, Record]:
    """Report runs of 12 pairs; what world and seed add is shared by a pair, and each run has noise of its own."""
    rng = random.Random(0)
    records: dict[Run, Record] = {}
    for world in FULL.world_seeds:
        for seed in FULL.seeds:
            shared = rng.gauss(0.0, 0.05)
            for arm, own in gain.items():
                run = Run("sparse", arm, world, seed, "report", 1e-3, 0.3 if arm == "sd" else 0.0)
                slope = 0.02 + (own + shared + rng.gauss(0.0, 0.02)) / 15
                train = [min(1.0, max(0.0, slope * step)) for step in range(1, 31)]
                records[run] = asdict(run) | {
                    "status": "failed" if run == failed else "ok",
                    "train_em": train,
                    "sampled_em": [[step, slope * step] for step in range(0, 31, 5)],
                    "final_greedy_em": 0.9,
                    "valid_action_rate": [0.95] * 29 + [0.7 if (arm, world) == ("sd", 2) else 0.9],
                    "query_entropy": [0.5] * 30,
                    "cpu_seconds": 60.0 if arm == "sd" else 40.0,
                    "steps": 30,
                    "date": "2026-12-01T00:00:00+00:00",
                    "commit": "abc",
                    "command": f"python {run.name}",
                    "last_lines": ["it broke"],
                }
    return records


def section(page: str, start: str) -> dict[str, list[str]]:
    """Cells of the first table below a line that starts so, by their first cell."""
    table = page.partition(f"\n{start}")[2].partition("\n\n")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    return {cells[0]: cells[1:] for cells in rows[2:]}


def test_a_planted_effect_is_found_and_no_other() -> None:
    measured = measured_runs(SPARSE, made_up(GAIN))
    for name in ("train_area", "sampled_area"):
        found = comparisons(measured, "grpo", name)
        corrected = holm({arm: comparison.p for arm, comparison in found.items()})
        planted, none = (found[arm].difference for arm in ("sd", "entropy_penalty"))
        assert planted.half_width is not None and none.half_width is not None
        assert planted.mean == pytest.approx(0.1, abs=0.03) and planted.mean > planted.half_width
        assert corrected["sd"] < 0.01 < 0.05 < corrected["entropy_penalty"]
        assert abs(none.mean) < none.half_width
    nothing = comparisons(measured_runs(SPARSE, made_up(dict.fromkeys(GAIN, 0.0))), "grpo", "train_area")
    assert all(comparison.p > 0.05 for comparison in nothing.values())


def test_the_page_tells_every_measure() -> None:
    page = render(made_up(GAIN))
    measured = measured_runs(SPARSE, made_up(GAIN))
    own = comparisons(measured, "grpo", "train_area")["sd"]
    cells = section(page, "Minus GRPO:")["SD-Search"]
    assert cells[:3] == ["12", f"{own.difference.mean:+.3f} ± {own.difference.half_width:.3f}", f"{own.p:.4f}"]
    assert cells[3] == f"{2 * own.p:.4f}", "by Holm, the smaller of two"
    assert "GRPO" in section(page, "Minus GRPO + entropy penalty:")
    assert section(page, "Co-primary measures")["SD-Search"][-1] == "4 of 12"
    assert section(page, "Co-primary measures")["GRPO"][1] == "1.00"
    compute = section(page, "Equal compute")
    assert compute["SD-Search"][:2] == ["60.0", "1.50"] and compute["GRPO"][:2] == ["40.0", "1.00"]
    at_20 = [record["train_em"] for run, record in made_up(GAIN).items() if run.arm == "sd"]
    assert float(compute["SD-Search"][2]) == pytest.approx(sum(curve[18] for curve in at_20) / 12, abs=6e-4)
    assert "Failed runs: none." in page and "36 runs, 0.5 hours of CPU" in page and "Family dense" not in page


def test_a_failed_run_takes_its_pair_with_it_and_is_told() -> None:
    bad = Run("sparse", "sd", 1, 102, "report", 1e-3, 0.3)
    page = render(made_up(GAIN, failed=bad))
    assert section(page, "Minus GRPO:")["SD-Search"][0] == "11"
    assert "Failed runs: 1." in page and f"`python {bad.name}` ended with:\n\n```\nit broke\n```" in page


def test_runs_of_a_setting_that_is_not_chosen_any_more_are_left_out() -> None:
    records = made_up(GAIN)
    before = measured_runs(SPARSE, records)
    for run, record in list(records.items()):
        if run.arm == "grpo":
            records[replace(run, lr=2e-3)] = record | {"train_em": [0.9] * 30}
    assert len(measured_runs(SPARSE, records)) == 48, "without tuning nothing tells which they are"
    for rate in FULL.rates:
        for seed in FULL.tuning_seeds:
            area = 0.5 if rate == 1e-3 else 0.4
            records[Run("sparse", "grpo", 0, seed, "tuning", rate, 0.0)] = {"status": "ok", "train_em": [area]}
    assert measured_runs(SPARSE, records) == before


def test_pictures_are_svg_with_a_mark_for_each_arm() -> None:
    drawn = pictures(made_up(GAIN))
    assert set(drawn) == {"study_curves.svg", "study_forest.svg"}
    texts = {name: "".join(ElementTree.fromstring(text).itertext()) for name, text in drawn.items()}
    assert "sparse: train EM" in texts["study_curves.svg"] and "SD-Search" in texts["study_curves.svg"]
    assert drawn["study_curves.svg"].count("<polyline") == 3
    assert (
        drawn["study_forest.svg"].count("<circle") == 4
        and "sparse: GRPO + entropy penalty" in texts["study_forest.svg"]
    )


def test_the_page_keeps_what_was_written_above_its_mark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.jsonl"
    arguments = ["--results", str(results), "--docs", str(tmp_path)]
    assert main(arguments) == 1 and "expected report runs" in capsys.readouterr().out
    results.write_text("".join(json.dumps(record) + "\n" for record in made_up(GAIN).values()))
    assert main(arguments) == 0
    page = tmp_path / "results_study.md"
    once = page.read_text()
    assert once.startswith("# Results of the study\n") and once.endswith(render(made_up(GAIN)))
    page.write_text(once.replace(MARK, f"By hand.\n\n{MARK}") + "stale")
    assert main(arguments) == 0
    assert page.read_text() == once.replace(MARK, f"By hand.\n\n{MARK}")
    assert (tmp_path / "pictures/study_forest.svg").read_text().startswith("<svg xmlns=")
