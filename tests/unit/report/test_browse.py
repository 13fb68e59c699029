"""The terminal browser, driven by Textual's own pilot."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from helpers.reports import city_rollout, credit, write_records, write_run
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.report.rollouts import read_rollouts

if TYPE_CHECKING:
    from sdsearch_lightning.report.browse import RolloutBrowser


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small run with a mixed group at step 2, and a mixed and a wrong one at step 3."""
    folder = write_run(tmp_path_factory.mktemp("run"))
    for place, answers in ((8, ("Rome", "Oslo")), (9, ("Oslo", "Oslo"))):
        for index, answer in enumerate(answers):
            queries = ("capital of Italy", "where is Rome") if index else ("Rome",)
            rollout = city_rollout(answer, instance_id=(0, place), index=index, queries=queries)
            told = credit(rollout)
            if answer == "Rome":  # its group is the one whose queries are judged most differently
                told = tuple(replace(one, teacher_logprob=(-1.5,) * len(one.jsd)) for one in told)
            write_records(folder / "trajectories.jsonl", [rollout], "train", 3, block="[b]", credit=told)
    return folder


def played(run: Path, *acts: tuple[list[str], Callable[[RolloutBrowser], object]]) -> list[object]:
    """What is seen after the keys of each act, one act after the other."""
    pytest.importorskip("textual", reason="the extra `browse` is not installed")
    from sdsearch_lightning.report.browse import BUDGET, RolloutBrowser

    async def play() -> list[object]:
        seen = []
        app = RolloutBrowser("run", read_rollouts(run / "trajectories.jsonl", BUDGET))
        async with app.run_test(size=(120, 40)) as pilot:
            for keys, look in acts:
                await pilot.press(*keys)
                await pilot.pause()
                seen.append(look(app))
        return seen

    return asyncio.run(play())


def place(app: RolloutBrowser) -> tuple[object, ...]:
    group = app.group
    return (group and (group["phase"], group["step"], group["instance"][1]), app.sibling, app.token)


def screen(app: RolloutBrowser) -> str:
    return "\n".join("".join(segment.text for segment in line) for line in app.screen._compositor.render_strips())


def test_keys_choose(run: Path) -> None:
    acts: list[tuple[list[str], tuple[object, ...]]] = [
        ([], (("train", 3, 8), 0, None)),  # judged most differently
        (["down"], (("train", 3, 9), 0, None)),
        (["up", "2"], (("train", 3, 8), 1, None)),
        (["9"], (("train", 3, 8), 1, None)),  # there is no such sibling
        (["right", "right", "right", "right"], (("train", 3, 8), 1, (1, 0))),
        (["left"], (("train", 3, 8), 1, (0, 2))),
        (["escape"], (("train", 3, 8), 1, None)),
        (["f", "f"], (None, 1, None)),  # no group is all right
        (["f"], (("train", 3, 9), 0, None)),
        (["f", "left_square_bracket"], (("train", 2, 7), 0, None)),
        (["left_square_bracket", "end"], (("train", 3, 9), 0, None)),  # all steps
        (["p"], (("val", 12, 0), 0, None)),
    ]
    seen = played(run, *((keys, place) for keys, _ in acts))
    assert seen == [expected for _, expected in acts]


def test_the_screen_shows_what_the_page_shows(run: Path) -> None:
    def listed(app: RolloutBrowser) -> int:
        return len(app.listed)

    first, measured, *counts = played(
        run,
        (["2", "b", "right"], screen),
        (["m"], screen),
        (["slash", *"xyz"], listed),
        (["escape"], listed),
        (["slash", *"Rome", "left", "enter"], listed),
    )
    assert "sibling 2: wrong, reward 0.00, advantage -0.50" in str(first) and "[b]" in str(first)
    assert "+0.25  capital of" in str(first) and "teacher - student +0.25 nats" in str(first)
    assert "shown: JSD, nats per token" in str(measured) and "0.100" in str(measured)
    assert counts == [0, 2, 2]


def test_without_textual_one_line_names_the_extra(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "textual.app", None)
    monkeypatch.delitem(sys.modules, "sdsearch_lightning.report.browse", raising=False)
    with pytest.raises(ConfigError, match=r'Install it: pip install "sdsearch-lightning\[browse\]"') as caught:
        import sdsearch_lightning.report.browse  # noqa: F401
    assert "\n" not in str(caught.value)


def test_a_folder_without_rollouts_and_a_pipe_are_refused(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("textual", reason="the extra `browse` is not installed")
    from sdsearch_lightning.cli.commands import run as command
    from sdsearch_lightning.report.browse import browse

    with pytest.raises(ConfigError, match="found none in"):
        browse(tmp_path)
    assert command(["browse", str(run)]) == 2
    assert "needs a terminal" in capsys.readouterr().err
