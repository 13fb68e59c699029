"""Sequences drawn as letters: what neighbours share, what a body reads in each layout, and how batches are filled."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import get_args

import pytest
import torch

from sdsearch_lightning.policy.attention import CausalSegments
from sdsearch_lightning.policy.packing import LAYOUTS, Arrangement, LayoutName, PackedSequences, split_by_size


def packed(*drawn: str) -> PackedSequences:
    """From words such as `ab|cd`, a prompt and what follows; one letter is one token."""
    prompts = [row.index("|") for row in drawn]
    return PackedSequences.pack([[*map(ord, row.replace("|", ""))] for row in drawn], prompt_lengths=prompts)


def letters(token_ids: Sequence[int]) -> str:
    return "".join(chr(token) if token else "." for token in token_ids)


# What neighbours share


@pytest.mark.parametrize(
    ("drawn", "shared"),
    [
        (["ab|c"], [0]),
        (["ab|cd", "ab|e"], [0, 2]),
        (["ab|cd", "ab|e", "ab|fg", "xy|z", "xy|w", "q|r"], [0, 2, 2, 0, 2, 0]),
        (["ab|c", "ab|d", "ab|e", "ab|f"], [0, 2, 2, 2]),  # two groups that ask the same: one run
        (["ab|c", "xy|z", "ab|d"], [0, 0, 0]),  # no neighbours
        (["ab|c", "xb|c"], [0, 0]),
        (["ab|cd", "abc|d"], [0, 0]),  # a prompt that begins like another is another
        (["abc|d", "ab|cd"], [0, 0]),
        (["ab|", "ab|c"], [0, 0]),  # nothing of its own behind the prompt
        (["ab|c", "ab|"], [0, 0]),
        (["ab|c", "ab|", "ab|d", "ab|e"], [0, 0, 0, 2]),
        (["|ab", "|ab"], [0, 0]),
        (["ab|cd", "ab|cd"], [0, 2]),  # never beyond the prompt
    ],
)
def test_neighbours_share_a_whole_prompt_or_nothing(drawn: list[str], shared: list[int]) -> None:
    assert packed(*drawn).shared == tuple(shared)


def test_nothing_is_shared_unasked() -> None:
    assert PackedSequences.pack([[1, 2, 3], [1, 2, 4]]).shared == (0, 0)
    assert PackedSequences.pack([[1, 2, 3], [1, 2, 4]], prompt_lengths=[2, 2]).shared == (0, 2)


def test_lengths_are_those_of_the_sequences() -> None:
    sequences = packed("ab|cd", "ab|e", "x|y")
    assert sequences.lengths == (4, 3, 2)
    assert (sequences.num_sequences, sequences.max_length) == (3, 4)
    assert sequences.sequence_index.tolist() == [0] * 4 + [1] * 3 + [2] * 2
    assert sequences.to("meta").lengths == sequences.lengths and sequences.to("meta").shared == sequences.shared


# What the body reads


def segments(arrangement: Arrangement) -> list[tuple[int, int | None]]:
    assert isinstance(arrangement.attention, CausalSegments)
    return [tuple(segment) for segment in arrangement.attention.segments]


@pytest.mark.parametrize(
    ("drawn", "reads", "positions", "parts", "place"),
    [
        (["ab|cd", "ab|e"], "abcde", "01232", [(2, None), (2, 0), (1, 0)], "0123014"),
        (
            ["ab|c", "ab|d", "x|yz", "x|w", "pq|r"],
            "abcdxyzwpqr",
            "01220121012",
            [(2, None), (1, 0), (1, 0), (1, None), (2, 3), (1, 3), (3, None)],
            ["0 1 2", "0 1 3", "4 5 6", "4 7", "8 9 10"],
        ),
        (["ab|c", "ab|de", "ab|f"], "abcdef", "012232", [(2, None), (1, 0), (2, 0), (1, 0)], "0120134015"),
        (
            ["q|r", "ab|c", "ab|", "ab|d", "ab|e"],
            "qrabcababde",
            "01012010122",
            [(2, None), (3, None), (2, None), (2, None), (1, 3), (1, 3)],
            ["0 1", "2 3 4", "5 6", "7 8 9", "7 8 10"],
        ),
        (["ab|c", "xy|z"], "abcxyz", "012012", [(3, None), (3, None)], "012345"),
    ],
)
def test_a_shared_prompt_is_read_once(
    drawn: list[str], reads: str, positions: str, parts: list[tuple[int, int | None]], place: str | list[str]
) -> None:
    arrangement = LAYOUTS["shared_prefix"].arrange(packed(*drawn))
    assert letters(arrangement.token_ids[0].tolist()) == reads and arrangement.token_ids.shape[0] == 1
    assert arrangement.position_ids is not None
    assert arrangement.position_ids.tolist() == [[int(position) for position in positions]]
    assert segments(arrangement) == parts
    expected = list(place) if isinstance(place, str) else " ".join(place).split()
    assert arrangement.place.tolist() == [int(row) for row in expected]


def test_packed_reads_all_and_shares_nothing() -> None:
    sequences = packed("ab|cd", "ab|e")
    arrangement = LAYOUTS["packed"].arrange(sequences)
    assert letters(arrangement.token_ids[0].tolist()) == "abcdabe"
    assert arrangement.position_ids is not None and arrangement.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert segments(arrangement) == [(4, None), (3, None)]
    assert arrangement.place.tolist() == list(range(7))


def test_padded_reads_a_row_per_sequence() -> None:
    """Under the model's own attention, from position 0 on."""
    arrangement = LAYOUTS["padded"].arrange(packed("ab|cd", "ab|e", "x|y"))
    assert [letters(row) for row in arrangement.token_ids.tolist()] == ["abcd", "abe.", "xy.."]
    assert arrangement.position_ids is None and arrangement.attention is None
    assert arrangement.place.tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9]


def seen_from(arrangement: Arrangement, row: int) -> list[int]:
    """Indices, into what the body reads, that this row looks at."""
    starts, found = [0], []
    parts = segments(arrangement)
    for length, _ in parts:
        starts.append(starts[-1] + length)
    own = max(i for i, start in enumerate(starts[:-1]) if start <= row)
    prefix = parts[own][1]
    if prefix is not None:
        assert prefix < own and parts[prefix][1] is None
        found += range(starts[prefix], starts[prefix + 1])
    return [*found, *range(starts[own], row + 1)]


def is_faithful(sequences: PackedSequences, arrangement: Arrangement) -> bool:
    """Whether each token looks back at its own sequence, in order, and at nothing else."""
    read = arrangement.token_ids[0].tolist()
    assert arrangement.position_ids is not None
    start = 0
    for length in sequences.lengths:
        whole = sequences.token_ids[start : start + length].tolist()
        for i in range(length):
            row = int(arrangement.place[start + i])
            if [read[j] for j in seen_from(arrangement, row)] != whole[: i + 1]:
                return False
            if int(arrangement.position_ids[0, row]) != i:
                return False
        start += length
    return True


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
@pytest.mark.parametrize("seed", range(8))
def test_every_token_looks_back_at_its_own_sequence(seed: int, layout: str) -> None:
    dice = random.Random(seed)
    drawn = []
    for _ in range(dice.randint(1, 5)):
        prompt = "".join(dice.choices("ab", k=dice.randint(0, 3)))
        own = 1 if not prompt else 0  # no sequence is empty
        drawn += [f"{prompt}|{''.join(dice.choices('cde', k=dice.randint(own, 4)))}" for _ in range(dice.randint(1, 4))]
    sequences = packed(*drawn)
    arrangement = LAYOUTS[layout].arrange(sequences)
    assert is_faithful(sequences, arrangement)
    num_read = arrangement.token_ids.shape[1]
    assert set(arrangement.place.tolist()) == set(range(num_read)), "nothing is read that nobody has"
    assert num_read == len(sequences.token_ids) - (sum(sequences.shared) if layout == "shared_prefix" else 0)
    if num_read > 1:
        turned = arrangement._replace(place=arrangement.place.roll(1))
        assert not is_faithful(sequences, turned)


# Budgets


def test_sizes_are_what_a_body_computes_at_most() -> None:
    assert LAYOUTS["padded"].size([3, 5, 2]) == 15 and LAYOUTS["padded"].size([]) == 0
    assert LAYOUTS["packed"].size([3, 5, 2]) == LAYOUTS["shared_prefix"].size([3, 5, 2]) == 10
    drawn = packed("ab|cd", "ab|e", "x|y")
    for layout in LAYOUTS.values():
        assert layout.arrange(drawn).token_ids.numel() <= layout.size(drawn.lengths)


def test_every_layout_has_a_name_and_only_the_reference_keeps_the_teacher_whole() -> None:
    assert tuple(LAYOUTS) == get_args(LayoutName)
    assert {name for name, layout in LAYOUTS.items() if not layout.cuts_teacher} == {"padded"}


@pytest.mark.parametrize(
    ("layout", "max_tokens", "expected"),
    [
        ("packed", 10, [[9], [8, 2], [4, 3], [3, 1]]),
        ("packed", 1, [[9], [8, 2], [4, 3], [3, 1]]),
        ("packed", 14, [[9], [8, 2], [4, 3, 3, 1]]),
        ("packed", 19, [[9, 8, 2], [4, 3, 3, 1]]),
        ("packed", 30, [[9, 8, 2, 4, 3, 3, 1]]),
        ("padded", 14, [[9], [8, 2], [4, 3], [3, 1]]),
        ("padded", 16, [[9], [8, 2], [4, 3, 3, 1]]),
        ("padded", 27, [[9, 8, 2], [4, 3, 3, 1]]),
        ("padded", 63, [[9, 8, 2, 4, 3, 3, 1]]),
    ],
)
def test_batches_are_filled_longest_first(layout: str, max_tokens: int, expected: list[list[int]]) -> None:
    """Groups of sequences of these lengths; one that is larger than the budget is alone."""
    groups = [[4, 3], [9], [3, 1], [8, 2]]
    batches = split_by_size(groups, lambda group: group, max_tokens, LAYOUTS[layout].size)
    assert [[length for group in batch for length in group] for batch in batches] == expected


def test_no_item_is_no_batch() -> None:
    assert split_by_size([], lambda item: item, 10, sum) == []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(4))
def test_no_batch_is_too_large_and_none_could_take_the_next(seed: int, layout: str) -> None:
    dice, size = random.Random(seed), LAYOUTS[layout].size
    items = [tuple(dice.randint(1, 30) for _ in range(dice.randint(1, 4))) for _ in range(20)]
    batches = split_by_size(items, lambda item: item, 90, size)
    assert sorted(item for batch in batches for item in batch) == sorted(items)
    sizes = [size([length for item in batch for length in item]) for batch in batches]
    assert all(found <= 90 or len(batch) == 1 for found, batch in zip(sizes, batches, strict=True))
    for batch, after in zip(batches, batches[1:], strict=False):
        assert size([length for item in [*batch, after[0]] for length in item]) > 90
    longest = [max(item) for batch in batches for item in batch]
    assert longest == sorted(longest, reverse=True)


def test_tensors_are_long_and_where_they_are_asked_to_be() -> None:
    sequences = PackedSequences.pack([[1, 2], [3]], "meta")
    for tensor in (sequences.token_ids, sequences.position_ids, sequences.sequence_index):
        assert tensor.is_meta and tensor.dtype == torch.long and tensor.shape == (3,)
