from __future__ import annotations

from pathlib import Path

import pytest

from helpers.reports import write_run
from sdsearch_lightning.cli.commands import run as command
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.report import compare_runs, print_report
from sdsearch_lightning.report.versus import names_of


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    folders = [tmp_path / "one/x", tmp_path / "two/x"]
    for folder, weight in zip(folders, (0.0, 0.3), strict=True):
        folder.mkdir(parents=True)
        (write_run(folder) / "config.yaml").write_text(f"jsd:\n  weight: {weight}\n")
    return folders


def test_several_runs_are_a_table_and_a_page_of_all(
    pair: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "both.html"
    command(["report", *map(str, pair), "--output", str(page)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["one/x", "0.250", "0.750", "0.750", "0.750", "0.750", "0.750", "12", "-"] in lines
    assert ["jsd.weight", "0.0", "0.3"] in lines
    assert [str(page), "curves", "and", "rollouts,", "for", "a", "browser"] in lines
    html = page.read_text()
    assert "one/x, greedy" in html and "two/x, sampled" in html and "jsd.weight" in html
    assert not (pair[0] / "report.html").exists()


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    assert names_of([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert names_of([tmp_path / "a/x", tmp_path / "b/x", tmp_path / "b/y"]) == ["a/x", "b/x", "b/y"]
    with pytest.raises(ConfigError, match="expected different runs"):
        names_of([tmp_path / "a", tmp_path / "b/../a"])


def test_a_page_replaces_pages_only(pair: list[Path], tmp_path: Path) -> None:
    metrics = (pair[0] / "metrics.csv").read_text()
    folder = tmp_path / "folder.html"
    folder.mkdir()
    for path in (pair[0] / "metrics.csv", folder, tmp_path):
        with pytest.raises(ConfigError, match="ends in .html"):
            compare_runs(pair, path)
        with pytest.raises(ConfigError, match="ends in .html"):
            print_report(pair[0], path)
    assert (pair[0] / "metrics.csv").read_text() == metrics and folder.is_dir()


def test_more_runs_than_colours_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at most 8 runs, one for each colour, got 9"):
        compare_runs([tmp_path / str(index) for index in range(9)], tmp_path / "x.html")
