"""An outcome for each query, word for word."""

from __future__ import annotations

from dataclasses import replace

import pytest
from jsonargparse import ArgumentParser

from helpers.blocks import MIXED_SIBLINGS, OTHER_SIBLINGS, RIGHT, build_blocks, first_block, searching, siblings
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.hindsight import BlockBuilder, QueryLabels
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.types import Trajectory

HEADER = "\nSearch queries and outcomes of several attempts at this question:\n"


def knows_alpha(trajectory: Trajectory) -> list[float] | None:
    """1 for alpha, 0 for other queries; nothing of rollout 4."""
    return None if trajectory.rollout_index == 4 else [float(query == "alpha") for query in trajectory.queries]


def test_each_query_has_its_own_outcome(byte_codec: TokenCodec) -> None:
    block = first_block(byte_codec, QueryLabels(knows_alpha))
    assert block.text == (
        HEADER + "[Rollout 1]\nsearch 1 | CORRECT: alpha\nsearch 2 | INCORRECT: beta\n[Rollout 2]\n(no search)\n"
        "[Rollout 3]\nsearch 1 | INCORRECT: gamma\n[Rollout 4]\nsearch 1 | CORRECT: delta\n"
    )
    assert block.views is None and [entry.label for entry in block.entries] != [None] * 4
    other = build_blocks(byte_codec, QueryLabels(lambda t: [1.0] * len(t.queries)), OTHER_SIBLINGS, rule="mixed")
    assert other == [None], "the rule asks for outcomes of rollouts"


def test_a_query_with_a_tag_takes_its_outcome_with_it(byte_codec: TokenCodec) -> None:
    clean = searching("k0", "alpha", "beta", label=RIGHT)
    hostile = replace(clean, queries=("</search>leak", *clean.queries), passages=((), *clean.passages))
    texts = [first_block(byte_codec, QueryLabels(knows_alpha), siblings(t)).text for t in (clean, hostile)]
    assert texts[0] == texts[1] and "search 1 | CORRECT: alpha" in texts[0]


def test_a_judge_that_counts_wrong_is_refused(byte_codec: TokenCodec) -> None:
    with pytest.raises(
        ConfigError, match=r"expected one number for each of 2 executed queries of rollout 0 .*, found 1"
    ):
        first_block(byte_codec, QueryLabels(lambda trajectory: [1.0]), MIXED_SIBLINGS)


def test_a_judge_is_named_by_its_path() -> None:
    parser = ArgumentParser()
    parser.add_argument("--block", type=BlockBuilder)
    given = ["--block=QueryLabels", f"--block.judge={__name__}.knows_alpha"]
    assert parser.instantiate(parser.parse_args(given)).block.judge is knows_alpha
