"""What is wrong with the form of a rollout, against the cases of Search-R1's and AutoRefine's own checks."""

from __future__ import annotations

import pytest

from helpers.passages import PROTOCOL
from helpers.players import play, start
from sdsearch_lightning.protocol.form import format_faults
from sdsearch_lightning.protocol.tokenization import TokenCodec

SEARCH, ANSWER = "<think>a</think> <search>q</search>", "<think>b</think>\n<answer>x</answer>"
ACTIONS = ("search", "answer")


@pytest.mark.parametrize(
    ("turns", "faults"),
    [
        ([SEARCH, ANSWER], []),
        ([ANSWER], ["missing search"]),
        (["<search>q</search>", ANSWER], ["loose"]),  # no thought
        ([f"so {SEARCH}", ANSWER], ["loose"]),
        ([SEARCH + "!", ANSWER], ["loose"]),
        (["<think>a</think><think>b</think><search>q</search>", ANSWER], ["loose"]),
        (["<think>a<think>b</think><search>q</search>", ANSWER], ["loose", "unbalanced think"]),
        ([SEARCH, "<think>b</think>"], ["loose", "missing answer"]),
        ([], ["missing think", "missing search", "missing answer"]),
    ],
)
def test_faults(turns: list[str], faults: list[str]) -> None:
    assert list(format_faults(turns, ["think"], ACTIONS)) == faults


def test_refined_notes_are_a_part_of_the_form() -> None:
    refined = ["<think>a</think><search>q</search>", "<refine>r</refine> <think>b</think><answer>x</answer>"]
    assert format_faults(refined, ["think", "refine"], ACTIONS) == ()
    assert format_faults([SEARCH, ANSWER], ["think", "refine"], ACTIONS) == ("missing refine",)


def test_a_conversation_tells_of_its_own_turns_only(byte_codec: TokenCodec) -> None:
    """The observation, with tags of its own and an invalid-action message, is nothing that the policy wrote."""
    assert PROTOCOL.documents_tag not in PROTOCOL.policy_tags
    faults = play(start(byte_codec), byte_codec, [SEARCH, ANSWER]).format_faults
    assert set(faults) <= {"missing refine"}
    assert "loose" in play(start(byte_codec), byte_codec, ["<search></search>", ANSWER]).format_faults
