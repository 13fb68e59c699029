from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from helpers.reports import read_lines, write_metrics, write_run
from sdsearch_lightning.report import finish_run, print_report, read_run
from sdsearch_lightning.report.charts import MAX_POINTS, Curve, figure
from sdsearch_lightning.report.curves import CHARTS, figures
from sdsearch_lightning.report.example import Example
from sdsearch_lightning.report.html import MAX_PAGE, Run, page
from sdsearch_lightning.report.island import island
from sdsearch_lightning.report.metrics import Point, read_metrics
from sdsearch_lightning.report.rollouts import Rollouts
from sdsearch_lightning.report.settings import Settings
from sdsearch_lightning.report.summary import build_summary
from sdsearch_lightning.report.trajectories import append_records

VOID = {"meta"}
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>&\u2028\u2029\x1b[31m<!--"


class Parsed(HTMLParser):
    """Fails on a tag that is closed out of order; keeps elements, their texts and the scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.texts: list[str] = []
        self.policy = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on")], "a handler in the markup"
        if dict(attrs).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(attrs)["content"] or ""
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            attributes, text = self.scripts.pop()
            self.scripts.append((attributes, text + data))
        else:
            self.texts.append(data)

    @property
    def island(self) -> dict[str, Any]:
        (text,) = [text for attributes, text in self.scripts if attributes.get("type") == "application/json"]
        return json.loads(text)

    @property
    def code(self) -> list[str]:
        """Scripts that run."""
        return [text for attributes, text in self.scripts if attributes.get("type") != "application/json"]


def report(folder: Path) -> str:
    return (folder / "report.html").read_text()


def test_the_page_is_self_contained_and_well_formed(tmp_path: Path) -> None:
    finish_run(write_run(tmp_path), {"seed": 3})
    html = report(tmp_path)
    found = Parsed(html)
    assert not {"link", "img", "iframe", "object"} & set(found.seen)
    assert not re.search(r"src=|href=(?!\"#)|url\(|@import|https?:(?!//www.w3.org/2000/svg)", html)
    assert found.seen.count("figure") == 6  # what the run logged
    assert "held-out, greedy" in html
    assert "seed 3" in html


def test_only_the_page_s_own_scripts_may_run(tmp_path: Path) -> None:
    finish_run(write_run(tmp_path), {})
    found = Parsed(report(tmp_path))
    hashes = [base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in found.code]
    assert len(hashes) == 4
    scripts = " ".join(f"'sha256-{one}'" for one in hashes)
    assert found.policy.split("; ")[:3] == [
        "default-src 'none'",
        "style-src 'unsafe-inline'",
        f"script-src {scripts}",
    ]
    forbidden = r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function|setTimeout\(['\"`]"
    assert not re.search(forbidden, "".join(found.code))


def test_the_island_is_what_trajectories_jsonl_says(tmp_path: Path) -> None:
    finish_run(write_run(tmp_path), {})
    groups = Parsed(report(tmp_path)).island["groups"]
    lines = read_lines(tmp_path / "trajectories.jsonl")
    assert sum(len(group["rollouts"]) for group in groups) == len(lines)
    for line in lines:
        (group,) = [
            group
            for group in groups
            if group["instance"] == line["instance_id"]
            and group["step"] == line["step"]
            and group["phase"] == line["phase"].removesuffix("_sampled")
        ]
        assert group["question"] == line["question"]["text"] and group["gold"] == line["question"]["answers"]
        decoding = {"val": "greedy", "val_sampled": "sampled", "train": None}[line["phase"]]
        (rollout,) = [
            one
            for one in group["rollouts"]
            if one["index"] == line["rollout_index"] and one.get("decoding") == decoding
        ]
        assert (rollout["reward"], rollout["advantage"]) == (line["reward"], line["advantage"])
        queries = [row for row in rollout["rows"] if row["kind"] == "QUERY"]
        assert [row["text"] for row in queries] == line["queries"]
        for row, credit in zip(queries, line["credit"] or (), strict=line["credit"] is not None):
            both = [(s, t) for s, t in zip(credit["student_logprob"], credit["teacher_logprob"], strict=True) if t]
            mean = sum(t - s for s, t in both) / len(both)
            assert row["query"]["verdict"] == pytest.approx(mean, abs=1e-4)
            assert (row["query"]["tokens"], row["query"]["jsd"]) == (credit["tokens"], credit["jsd"])


def evil_run(folder: Path, text: str = EVIL) -> Path:
    """A run whose every text is `text`, or holds it."""
    write_run(folder)
    path = folder / "trajectories.jsonl"
    records = read_lines(path)
    for record in records:
        record["question"] = {**record["question"], "text": text, "answers": [text], "source": text}
        record["stop_reason"] = record["answer"] = text
        record["block"] = record["block"] and text
        for span in record["spans"]:
            span["text"] = text
        for credit in record["credit"] or ():
            credit["tokens"] = [f" {text}" for _ in credit["tokens"]]
            credit["teacher_top"] = [[[text, 0.5]] for _ in credit["tokens"]]
    path.unlink()
    append_records(path, records)
    (folder / "config.yaml").write_text(json.dumps({"model": {"model_name_or_path": text}, text: text}))
    return folder


def test_text_from_data_never_becomes_markup(tmp_path: Path) -> None:
    metrics = read_metrics(evil_run(tmp_path))
    summary = build_summary(metrics, {"questions": EVIL, "seed": EVIL, "versions": {EVIL: EVIL}})
    html = page([read_run(tmp_path, f"{EVIL}\ud800", summary=summary)])
    assert "\ud800" not in html
    found = Parsed(html)
    assert len(found.scripts) == 5 and "img" not in found.seen
    island_text = next(text for attributes, text in found.scripts if attributes)
    assert not {"<", ">", "\u2028", "\u2029", "\x1b"} & set(island_text)
    assert html.count("&lt;script&gt;") >= 8
    group = found.island["groups"][0]
    shown = "</script><script>alert(1)</script><img src=x onerror=alert(1)>& [31m<!--"
    assert (group["question"], group["gold"], group["source"]) == (shown, [shown], shown)
    assert {row["text"] for row in group["rollouts"][0]["rows"]} == {shown}


def test_numbers_that_are_text_are_no_numbers(tmp_path: Path) -> None:
    """trajectories.jsonl may come from elsewhere."""
    path = write_run(tmp_path) / "trajectories.jsonl"
    records = read_lines(path)
    for record in records:
        record["reward"] = record["advantage"] = EVIL
        record["query_credit"] = record["query_advantages"] = [EVIL] * len(record["queries"])
        for credit in record["credit"] or ():
            credit["jsd"] = credit["student_logprob"] = [EVIL] * len(credit["jsd"])
    path.unlink()
    append_records(path, records)
    print_report(tmp_path)
    found = Parsed(report(tmp_path))
    views = [view for group in found.island["groups"] for view in group["rollouts"]]
    assert not any("reward" in view or "advantage" in view for view in views)
    queries = [row["query"] for view in views for row in view["rows"] if "query" in row]
    assert all(query["credit"] is None and query.get("verdict") is None for query in queries)


def test_json_in_a_page_ends_no_script_and_reads_back() -> None:
    value = {"a": EVIL, "b": [1.5, None, "ä"]}
    assert json.loads(island(value)) == value
    assert not {"<", ">", "&", "\u2028", "\u2029"} & set(island(value)) and "ä" in island(value)


def test_missing_columns_and_files_leave_sections_out(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"step": 0, "train/loss": 1.0}])
    print_report(tmp_path)
    html = report(tmp_path)
    assert "svg" not in Parsed(html).seen
    assert "holds none of the curves" in html and "Which query earned what" not in html
    assert "holds no config.yaml" in html


def test_a_page_explains_what_it_shows_and_no_more(tmp_path: Path) -> None:
    path = write_run(tmp_path) / "trajectories.jsonl"
    print_report(tmp_path)
    assert "can be red" in report(tmp_path) and "Own credit" not in report(tmp_path)
    records = [
        record
        | {
            "credit": None,
            "query_credit": [0.25] * len(record["queries"]),
            "query_advantages": [-1.5] * len(record["queries"]),
        }
        for record in read_lines(path)
    ]
    path.unlink()
    append_records(path, records)
    print_report(tmp_path)
    assert "can be red" not in report(tmp_path) and "Own credit" in report(tmp_path)


def test_a_large_run_is_sampled_to_a_page_that_says_so(tmp_path: Path) -> None:
    path = write_run(tmp_path) / "trajectories.jsonl"
    records = [record for record in read_lines(path) if record["phase"] == "train"]
    for record in records:
        record["spans"][4]["text"] = "<" * 9000  # six bytes each in the island
    path.unlink()
    numbered = ((step, question) for step in range(1, 41) for question in range(20))
    many = [record | {"step": step, "instance_id": [0, q]} for step, q in numbered for record in records]
    append_records(path, many)
    print_report(tmp_path)
    html = report(tmp_path)
    assert 0.8 * MAX_PAGE < len(html.encode()) < MAX_PAGE
    told = re.search(r"(\d+) of 800 training groups are in this page, from 40 of 40 steps", html)
    groups = Parsed(html).island["groups"]
    assert told and int(told[1]) == len(groups) > 40
    assert {group["step"] for group in groups} == set(range(1, 41))


def svg(curves: list[Curve], **options: Any) -> ElementTree.Element:
    drawn = figure("t", "u", curves, **options)
    assert drawn
    return ElementTree.fromstring(drawn.svg)


def corners(element: ElementTree.Element, kind: str = "line") -> list[tuple[float, float]]:
    (line,) = [line for line in element.iter("polyline") if line.get("class") == kind]
    return [(float(x), float(y)) for x, y in (corner.split(",") for corner in line.get("points", "").split())]


@pytest.mark.parametrize("values", [[0.0, 0.0], [1e-9, 3e-9], [-2.0, 5.0], [123456.0], [0.999, 1.0]])
def test_points_stay_inside_the_axes(values: list[float]) -> None:
    found = svg([Curve("c", [Point(step, value) for step, value in enumerate(values)], "--c0")])
    ys = [y for _, y in corners(found)]
    assert len(ys) == len(values) == len(list(found.iter("circle")))
    assert all(8 <= y <= 166 for y in ys)
    assert sorted(ys, reverse=True) == [y for _, y in sorted(zip(values, ys, strict=True))]
    assert "step" in [text.text for text in found.iter("text")]


def test_curves_without_finite_points_draw_nothing() -> None:
    assert figure("t", "u", [Curve("c", [], "--c0")]) is None
    assert figure("t", "u", [Curve("c", [Point(0, math.nan)], "--c0")]) is None


def test_long_curves_are_thinned_to_means() -> None:
    points = [Point(step, float(step % 2)) for step in range(10 * MAX_POINTS)]
    found = svg([Curve("c", points, "--c0")])
    assert len(corners(found)) == MAX_POINTS and not list(found.iter("circle"))
    assert {y for _, y in corners(found)} == {corners(found)[0][1]}  # every stretch has the mean 0.5


def test_a_noisy_curve_is_drawn_under_its_running_mean() -> None:
    points = [Point(step, float(step % 2)) for step in range(20)]
    found = svg([Curve("c", points, "--c0", is_noisy=True)])
    assert [line.get("class") for line in found.iter("polyline")] == ["faint", "line"]


def test_several_runs_have_a_colour_each_and_fewer_quantities_where_they_are_many() -> None:
    metrics = {quantity.key: [Point(1, 0.5)] for chart in CHARTS for quantity in chart.quantities}
    one, three, eight = (figures([(f"run{index}", metrics) for index in range(count)]) for count in (1, 3, 8))
    assert len(one) == len(three) == len(eight) == len(CHARTS)
    assert [entry.label for entry in one[0].legend] == ["greedy", "sampled"]
    assert [(entry.label, entry.color, entry.dash) for entry in three[0].legend[:3]] == [
        ("run0, greedy", "--c0", ""),
        ("run0, sampled", "--c0", "5 4"),
        ("run1, greedy", "--c1", ""),
    ]
    assert [entry.label for entry in eight[0].legend] == [f"run{index}" for index in range(8)]
    assert eight[0].unit == "held-out questions, greedy"


def test_a_weight_that_is_never_on_has_no_chart() -> None:
    assert figures([("run", {"distill/weight": [Point(1, 0.0), Point(2, 0.0)]})]) == []


def test_every_value_of_a_file_is_escaped(tmp_path: Path) -> None:
    """Numbers too: a step may be text."""
    records = read_lines(write_run(tmp_path) / "trajectories.jsonl")
    for record in records:
        record["step"] = f"{record['step']}{EVIL}"
        record["stop_reason"] = EVIL
    metrics = read_metrics(tmp_path)
    example = Example((records[0],), (records[4],), EVIL)
    summary = build_summary(metrics, {"questions": EVIL, "seed": EVIL, "versions": {EVIL: EVIL}})
    settings = Settings(EVIL, {EVIL: EVIL}, [(EVIL, EVIL)])
    runs = [Run(EVIL, summary, {EVIL: [Point(0, 1.0)]} | metrics, Rollouts(example), settings)]
    for html in (page(runs), page([*runs, Run("b", summary, metrics, Rollouts(), Settings(flat={EVIL: "x"}))])):
        assert len(Parsed(html).scripts) == 5 and html.count("&lt;script&gt;") >= 6
