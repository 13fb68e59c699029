from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from helpers.reports import write_metrics, write_run
from sdsearch_lightning.report import finish_run, print_report
from sdsearch_lightning.report.charts import MAX_POINTS, Curve, chart
from sdsearch_lightning.report.example import Example
from sdsearch_lightning.report.html import page
from sdsearch_lightning.report.metrics import Point, read_metrics
from sdsearch_lightning.report.summary import build_summary

VOID = {"meta"}


class Balance(HTMLParser):
    """Fails on a tag that is closed out of order, and keeps the tags that were met."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def balanced(html: str) -> Balance:
    parser = Balance()
    parser.feed(html)
    assert parser.open == []
    return parser


def report(folder: Path) -> str:
    return (folder / "report.html").read_text()


def test_the_page_is_self_contained_and_well_formed(tmp_path: Path) -> None:
    finish_run(write_run(tmp_path), {"seed": 3})
    html = report(tmp_path)
    seen = balanced(html).seen
    assert not {"script", "link", "img", "iframe"} & set(seen)
    assert not re.search(r"(src|href)=|url\(|@import|https?:", html)
    assert seen.count("svg") == 5  # all but entropy, which the run did not log
    assert "held-out, greedy" in html and "</i>training" not in html  # half of a chart is a chart
    assert "seed 3" in html


def test_text_from_data_is_escaped(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = tmp_path / "trajectories.jsonl"
    evil = "</pre><script>alert(1)</script>&"
    text = path.read_text().replace("[Rollout 1 | CORRECT]", evil).replace("Oslo", evil).replace(" of", f" {evil}")
    path.write_text(text.replace("where is", f"{evil} is"))
    print_report(tmp_path)
    html = report(tmp_path)
    assert "script" not in balanced(html).seen
    assert "&lt;script&gt;" in html


def test_query_tokens_are_shaded_by_jsd_and_by_the_teachers_wish(tmp_path: Path) -> None:
    write_run(tmp_path)
    print_report(tmp_path)
    marks = re.findall(r'<mark style="background:([^"]*)" title="([^"]*)">([^<]*)</mark>', report(tmp_path))
    assert [text for _, _, text in marks[:3]] == ["capital", "of", "Italy"]
    share = round(80 * math.sqrt(0.1 / math.log(2)))
    assert marks[0][0] == f"color-mix(in srgb, var(--agree) {share}%, transparent)"
    assert "--differ" in marks[2][0]  # outside the teacher's top-k
    assert marks[0][1].startswith("capital: student 0.607, teacher 0.779, JSD 0.100 nats. Teacher&#x27;s first: ")
    assert "teacher 0, JSD" in marks[2][1]


def test_credit_of_a_query_stands_behind_it_with_and_without_a_teacher(tmp_path: Path) -> None:
    path = write_run(tmp_path) / "trajectories.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        number = len(record["queries"])
        record |= {"credit": None, "query_credit": [0.25] * number, "query_advantages": [-1.5] * number}
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    print_report(tmp_path)
    html = report(tmp_path)
    assert "</small>" in html and "<small> credit -1.50 (value 0.25)</small>" in html
    told = html[html.index("Which query earned what") :]
    assert "in standard" in told and "hindsight block" not in told.split("<h3>")[0]


def test_missing_columns_and_files_leave_sections_out(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"step": 0, "train/loss": 1.0}])
    print_report(tmp_path)
    html = report(tmp_path)
    assert "svg" not in balanced(html).seen
    assert "holds none of the curves" in html and "Which query earned what" not in html


def svg(figure: str) -> ElementTree.Element:
    return ElementTree.fromstring(figure[figure.index("<svg") : figure.index("</svg>") + 6])


@pytest.mark.parametrize("values", [[0.0, 0.0], [1e-9, 3e-9], [-2.0, 5.0], [123456.0], [0.999, 1.0]])
def test_points_stay_inside_the_axes(values: list[float]) -> None:
    figure = chart("t", "u", [Curve("c", [Point(step, value) for step, value in enumerate(values)], "--first")])
    ys = [float(circle.get("cy", "nan")) for circle in svg(figure).iter("circle")]
    assert len(ys) == len(values)
    assert all(8 <= y <= 166 for y in ys)
    assert sorted(ys, reverse=True) == [y for _, y in sorted(zip(values, ys, strict=True))]


def test_curves_without_finite_points_draw_nothing() -> None:
    assert chart("t", "u", [Curve("c", [], "--first")]) == ""
    assert chart("t", "u", [Curve("c", [Point(0, math.nan)], "--first")]) == ""


def test_long_curves_are_thinned_to_means() -> None:
    points = [Point(step, float(step % 2)) for step in range(10 * MAX_POINTS)]
    circles = list(svg(chart("t", "u", [Curve("c", points, "--first")])).iter("circle"))
    assert len(circles) == MAX_POINTS
    assert {circle.get("cy") for circle in circles} == {circles[0].get("cy")}  # every stretch has the mean 0.5


def test_a_noisy_curve_is_drawn_under_its_running_mean() -> None:
    points = [Point(step, float(step % 2)) for step in range(20)]
    figure = svg(chart("t", "u", [Curve("c", points, "--first", is_noisy=True)]))
    assert [line.get("class") for line in figure.iter("polyline")] == ["faint", "line"]


def test_every_value_of_a_file_is_escaped(tmp_path: Path) -> None:
    """Numbers too: trajectories.jsonl and summary.json may come from elsewhere, and hold text in their place."""
    evil = "<script>alert(1)</script>"
    write_run(tmp_path)
    path = tmp_path / "trajectories.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    metrics = read_metrics(tmp_path)
    for record in records:
        record["step"] = f"{record['step']}{evil}"
        record["stop_reason"], record["block"] = evil, record["block"] and evil
        for credit in record["credit"] or ():
            credit["tokens"] = [f" {evil}" for _ in credit["tokens"]]
    before, after, taught = records[0], records[4], records[-2:]
    example = Example((before,), (after,), evil, (tuple(taught),))
    summary = build_summary(metrics, {"questions": evil, "seed": evil, "versions": {evil: evil}})
    html = page(evil, summary, metrics, example)
    assert "script" not in balanced(html).seen and html.count("&lt;script&gt;") >= 8
