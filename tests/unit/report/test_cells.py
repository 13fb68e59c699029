from __future__ import annotations

import pytest
from rich.console import Console, RenderableType

from helpers.reports import write_run
from sdsearch_lightning.report.cells import MEASURES, detail, entry, group_map, left_out, measures, places, transcript
from sdsearch_lightning.report.rollouts import read_rollouts
from sdsearch_lightning.report.views import View


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> View:
    """The taught group of the small run: a right and a wrong rollout with one query each."""
    rollouts = read_rollouts(write_run(tmp_path_factory.mktemp("run")) / "trajectories.jsonl", 10**9)
    (found,) = [one for one in rollouts.groups if one["phase"] == "train"]
    return found


def printed(what: RenderableType, width: int = 100) -> list[str]:
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        console.print(what)
    return [line.rstrip() for line in capture.get().splitlines()]


def test_a_map_has_a_line_per_sibling_with_number_query_and_answer(group: View) -> None:
    assert [measure.key for measure in measures(group)] == ["verdict", "mean_jsd"]
    lines = printed(group_map(group, 1, MEASURES[0], 80))
    assert [line.split() for line in lines] == [
        ["sibling", "search", "1", "answer"],
        ["✓", "1", "+0.50", "+0.25", "capital", "of", "Italy", "Rome"],
        ["▸", "✗", "2", "-0.50", "+0.25", "capital", "of", "Italy", "Oslo"],
    ]
    assert "0.100  capital" in printed(group_map(group, 1, MEASURES[1], 80))[1]


@pytest.mark.parametrize("width", [30, 40, 60])
def test_numbers_stay_whole_where_there_is_little_room(group: View, width: int) -> None:
    wide = group | {"rollouts": [one | {"rows": one["rows"] * 3} for one in group["rollouts"]]}
    first = printed(group_map(wide, 0, MEASURES[0], width), width)[1]
    assert "+0.25" in first and "…" not in first.split("+0.25")[0]


def test_a_token_tells_what_both_thought_of_it(group: View) -> None:
    rollout = group["rollouts"][0]
    assert places(rollout) == [(0, 0), (0, 1), (0, 2)]
    lines = printed(transcript(rollout, (0, 0)))
    assert lines[0] == "search   capital of Italy"
    assert "         teacher - student +0.25, JSD 0.100, 1 outside the teacher's top-k" in lines
    assert [line.split()[0] for line in lines if "60.65%" in line] == ["student"]
    assert any("teacher - student +0.25 nats, JSD 0.100 nats" in line for line in lines)
    outside = str(detail(rollout["rows"][0]["query"], 2))
    assert "teacher     outside the teacher's top-k" in outside and "teacher - student" not in outside


def test_what_is_unreliable_is_called_so() -> None:
    query = {"tokens": ["a"], "student": [-9.0], "teacher": [-7.0], "jsd": [0.1], "top": [[]], "unreliable": [0]}
    assert "unreliable: both give it less than 1%" in str(detail(query, 0))


def test_text_of_a_rollout_is_no_markup(group: View) -> None:
    hostile = "[red]x[/red] [link=x]"
    rows = [{"kind": "REASONING", "text": hostile}]
    assert printed(transcript({"rows": rows, "right": True}, None)) == [f"think    {hostile}"]
    assert str(entry(group | {"question": hostile}, with_step=True)) == f"   2 ●○ {hostile}"


def test_what_is_left_out_is_told() -> None:
    assert left_out([(3, 4), (1, 1)]) == ", 4 of 5 groups"
    assert left_out([(4, 4)]) == left_out([]) == ""
