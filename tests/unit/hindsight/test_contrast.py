"""Two texts for each rollout, word for word: the right siblings' queries and the wrong ones', never its own."""

from __future__ import annotations

from helpers.blocks import MIXED_SIBLINGS, RIGHT, WRONG, build_blocks, first_block, numbered, searching, siblings
from helpers.passages import PROTOCOL
from sdsearch_lightning.hindsight import BlockBudget, ContrastedSiblings
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.types import HindsightBlock, RolloutGroup

HEADER = "\nSearch queries and outcomes of several attempts at this question:\n"


def entry(number: int, outcome: str, *queries: str) -> str:
    told = f"[Rollout {number}{f' | {outcome}' if outcome else ''}]\n"
    return told + "".join(f"search {n}: {query}\n" for n, query in enumerate(queries, 1))


def pairs(block: HindsightBlock, group: RolloutGroup) -> dict[int, list[tuple[str, str | None]]]:
    return {
        t.rollout_index: [
            (view.text.removeprefix(HEADER), (view.contrast or "").removeprefix(HEADER)) for view in found
        ]
        for t in group.trajectories
        if (found := block.views_of(t.rollout_index))
    }


def test_right_siblings_and_apart_from_them_wrong_ones(byte_codec: TokenCodec) -> None:
    """Rollout 1 never searched, 2 ended in an error; 3 is the one wrong rollout with a query."""
    block = first_block(byte_codec, ContrastedSiblings())
    alpha, gamma, delta = ("alpha", "beta"), ("gamma",), ("delta",)
    right, wrong = "CORRECT", "INCORRECT"
    assert pairs(block, MIXED_SIBLINGS) == {
        0: [(entry(1, right, *delta), entry(1, wrong, *gamma))],
        1: [(entry(1, right, *alpha) + entry(2, right, *delta), entry(1, wrong, *gamma))],
        3: [(entry(1, right, *alpha) + entry(2, right, *delta), entry(1, "", *alpha) + entry(2, "", *delta))],
        4: [(entry(1, right, *alpha), entry(1, wrong, *gamma))],
    }
    assert block.weight == 1 and all(view.text.startswith(HEADER) for view in block.views or ())


def test_without_a_right_sibling_the_wrong_ones_stand_there_without_outcomes(byte_codec: TokenCodec) -> None:
    group = numbered((WRONG, WRONG))
    assert pairs(first_block(byte_codec, ContrastedSiblings(), group), group) == {
        0: [(entry(1, "", "query 1"), entry(1, "INCORRECT", "query 1"))],
        1: [(entry(1, "", "query 0"), entry(1, "INCORRECT", "query 0"))],
    }


def test_a_rollout_without_a_sibling_that_searched_is_not_taught(byte_codec: TokenCodec) -> None:
    group = siblings(searching("k0", "alpha", label=RIGHT), searching("k1", label=WRONG))
    assert list(pairs(first_block(byte_codec, ContrastedSiblings(), group), group)) == [1]
    assert build_blocks(byte_codec, ContrastedSiblings(), siblings(searching("k0", "alpha", label=RIGHT))) == [None]


def test_a_side_over_the_budget_leaves_no_view(byte_codec: TokenCodec) -> None:
    budget = BlockBudget(3)
    assert ContrastedSiblings().build([MIXED_SIBLINGS], "all", PROTOCOL, byte_codec, budget) == [None]
    assert budget.groups_over_budget == 1 and budget.dropped_entries == 11
