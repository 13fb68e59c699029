"""An answer in the terminal: labels for tags, whatever pieces the text comes in, and no character that drives it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from sdsearch_lightning.cli.answer_stream import AnswerStream
from sdsearch_lightning.cli.parsers import split_keys
from sdsearch_lightning.errors import RetrievalError
from sdsearch_lightning.inference.asker import Answer
from sdsearch_lightning.protocol.conversation import Continue, Search, Stop
from sdsearch_lightning.protocol.heard import Found, Wrote
from sdsearch_lightning.types import Passage, Question, StopReason, Trajectory

TAGS = tuple(f"<{slash}{name}>" for name in ("think", "search", "answer", "documents") for slash in ("", "/"))
TURN = "<think> need a <b\n c </think><search> Rome </search>"
PASSAGES = (Passage("1", '"Rome"\nin Italy \x1b[2J'), Passage("2", '"Oslo"\nin Norway'))


def answer(text: str | None, stop: StopReason = StopReason.ANSWERED, unknown: bool = False) -> Answer:
    trajectory = Trajectory(Question("0", "where ?", ()), (0, 0), 0, (), stop)
    return Answer("where ?", text, ("Rome",), (PASSAGES,), stop, trajectory, None, unknown)


def shown(*pieces: str, width: int = 1, told: Answer | None = None) -> str:
    """What stands in a terminal 60 columns wide."""
    out = io.StringIO()
    stream = AnswerStream(Console(file=out, width=60, force_terminal=False, highlight=False), TAGS)
    for text in pieces:
        for at in range(0, len(text), width):
            stream(Wrote(text[at : at + width]))
        if text == TURN:
            stream(Search("Rome"))
            stream(Found(PASSAGES))
        elif text.endswith("</answer>"):
            stream(Stop(StopReason.ANSWERED))
        else:
            stream(Continue((1,)))
    stream.finish(told or answer("Italy"))
    return out.getvalue()


@pytest.mark.parametrize("width", [1, 3, 7, 1000])
def test_lines_are_the_same_whatever_the_pieces(width: int) -> None:
    assert shown(TURN, "hm </sea", "<answer> Italy </answer>", width=width).splitlines() == [
        "think     need a <b c",
        "search    Rome",
        'read      [1] "Rome" in Italy [2J',
        'read      [2] "Oslo" in Norway',
        "write     hm </sea",
        "          no action: the model is told so and tries again",
        "answer    Italy",
        'rests on  [1] "Rome" in Italy [2J',
    ]


def test_nothing_drives_the_terminal_and_nothing_is_markup() -> None:
    text = shown("<answer> [red]x\x1b]0;t\x07 \u202ey\x9b2J </answer>")
    assert "[red]x ]0;t  y 2J".split() == text.splitlines()[0].split()[1:]
    assert all(c.isprintable() or c == "\n" for c in text)


def test_an_answer_that_rests_on_nothing_is_told() -> None:
    assert "rests on  nothing: no passage that was found holds these words" in shown(told=answer("Bergen"))
    text = shown(told=answer(None, StopReason.MAX_SEARCHES, unknown=True))
    assert "no answer: max searches" in text and "lacks some words of the question" in text


def test_a_failed_search_is_told() -> None:
    out = io.StringIO()
    AnswerStream(Console(file=out), TAGS)(Found(RetrievalError("gone\x1b[2J")))
    assert out.getvalue() == "failed    gone [2J\n"


def test_an_answer_as_json_has_no_infinity() -> None:
    told = answer("Italy")
    passages = told.to_dict()["passages"]
    assert [p["holds_answer"] for p in passages[0]] == [True, False]
    endless = Answer(
        *list(vars(told).values())[:3], ((Passage("3", "x", float("inf")),),), *list(vars(told).values())[4:]
    )
    assert endless.to_dict()["passages"][0][0]["score"] is None


def test_keys_of_fit_are_told_from_the_question() -> None:
    argv = ["--rollout.top_k", "3", "who ?", "--run", "r", "--model.protocol=search_r1", "--model", "m", "--data", "D"]
    assert split_keys(argv) == (
        ["who ?", "--run", "r", "--model", "m"],
        ["--rollout.top_k=3", "--model.protocol=search_r1", "--data=D"],
    )
    assert split_keys(["--trainer.devices", "2"]) == (["--trainer.devices", "2"], [])
    with pytest.raises(SystemExit):
        split_keys(["--rollout.top_k"])
