import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from sdsearch_lightning.datamodules.loaders import EvaluationBatches, Share, TrainingBatches
from sdsearch_lightning.datamodules.mixture import Mixture, fingerprint, hold_out, overlap
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.types import Question


def rows(batches):
    return [batch for batch, _ in batches]


def training(count=23, share=None, seed=5, fingerprint="a", sizes=(), weights=()):
    rows = Mixture(range(count), sizes, weights)
    return TrainingBatches(rows, lambda rows, ids: (tuple(rows), tuple(ids)), share or Share(4), seed, fingerprint)


def mixed(*weights, **options):
    """Rows 0 to 12 of one file, 13 to 22 of another."""
    return training(sizes=(13, 10), weights=weights, **options)


def endless(loader):
    while True:
        yield from loader


# --- the order of training ------------------------------------------------------------------------------------------


def test_an_epoch_is_a_permutation_without_its_short_end():
    loader = training()
    first, second = list(loader), list(loader)
    assert len(loader) == len(first) == 5
    seen = [row for batch in rows(first) for row in batch]
    assert len(set(seen)) == 20 and all(len(batch) == 4 for batch in rows(first))
    assert seen != sorted(seen) and rows(first) != rows(second)  # shuffled, and anew in the next epoch
    left_out = set(range(23)) - set(seen), set(range(23)) - {row for batch in rows(second) for row in batch}
    assert left_out[0] != left_out[1]


def test_the_order_depends_on_seed_and_epoch_only():
    torch.manual_seed(1)
    one = training()
    list(one)
    torch.manual_seed(2)
    other = training()
    other.set_epoch(1)
    assert list(one) == list(other) != list(training()) != list(training(seed=6))


def test_instance_ids_are_unique_over_epochs():
    loader = training()
    ids = [instance_id for _ in range(3) for _, ids in loader for instance_id in ids]
    assert len(ids) == len(set(ids)) == 60 and ids[0] == (0, 0) and ids[-1] == (2, 19)


def test_without_a_seed_the_order_is_kept():
    assert rows(training(seed=None)) == [tuple(range(start, start + 4)) for start in range(0, 20, 4)]


def test_the_order_stays_that_of_earlier_versions():
    """Resumed runs and published numbers depend on it."""
    loader = training()
    expected = [(13, 19, 9, 15), (10, 22, 2, 7), (16, 11, 18, 21), (1, 4, 5, 20), (0, 8, 3, 17), (8, 1, 19, 18)]
    assert [*rows(loader), next(iter(loader))[0]] == expected
    assert rows(mixed(1, 1)) == rows(mixed(1.0, 1.0)) == expected[:5]
    assert rows(TrainingBatches(range(23), lambda rows, ids: (tuple(rows), ids), Share(4), 5)) == expected[:5]


@pytest.mark.parametrize("weights", [(), (1.5, 0.4)])
@pytest.mark.parametrize("done", range(16))
def test_resuming_anywhere_equals_going_on(done, weights):
    stream, loader = (endless(full := mixed(*weights)), mixed(*weights))
    for _ in range(done):
        next(stream)
    state = json.loads(json.dumps(full.state_dict()))  # plain types only: it is loaded with weights_only
    loader.load_state_dict(state)
    resumed = endless(loader)
    assert [next(stream) for _ in range(12)] == [next(resumed) for _ in range(12)]


def test_a_cursor_that_replays_its_last_batch_would_be_noticed():
    full, loader = training(), training()
    batches = iter(full)
    next(batches)
    loader.load_state_dict(full.state_dict() | {"batch": 0})
    assert next(iter(loader)) != next(batches)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"count": 24}, "{'rows': 23}, found {'rows': 24}"),
        ({"seed": 6}, "{'seed': 5}, found {'seed': 6}"),
        ({"fingerprint": "b"}, "{'fingerprint': 'a'}, found {'fingerprint': 'b'}"),
        (
            {"sizes": (13, 10), "weights": (2, 1)},
            "{'rows_and_weights': []}, found {'rows_and_weights': [[13, 2], [10, 1]]}",
        ),
    ],
)
def test_a_checkpoint_of_other_data_is_refused(other, told):
    with pytest.raises(ConfigError) as error:
        training(**other).load_state_dict(training().state_dict())
    assert str(error.value) == (
        f"The checkpoint stands in training data with {told}. Resume with the same files, weights, data.seed and total "
        "batch size, or start a run under a new name."
    )


def test_other_weights_and_older_checkpoints_are_refused():
    state = mixed(2, 1).state_dict()
    with pytest.raises(ConfigError, match=r"\[\[13, 2\], \[10, 1\]\].* found .*\[\[13, 1\], \[10, 2\]\]"):
        mixed(1, 2).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"\{'fingerprint': None\}, found \{'fingerprint': 'a'\}"):
        training().load_state_dict({k: v for k, v in training().state_dict().items() if k != "fingerprint"})
    mixed(2, 1).load_state_dict(json.loads(json.dumps(state)))
    training(sizes=(13, 10)).load_state_dict(training().state_dict())  # all of weight 1: files may be cut anew


def test_a_checkpoint_moves_to_another_number_of_ranks():
    single, ranks = training(share=Share(4)), [training(share=Share(2, rank, 2)) for rank in (0, 1)]
    next(iter(single))
    for loader in ranks:
        loader.load_state_dict(single.state_dict())
    for whole, *parts in zip(single, *ranks, strict=True):
        assert sorted(whole[1]) == sorted(parts[0][1] + parts[1][1])
        assert sorted(whole[0]) == sorted(parts[0][0] + parts[1][0])


def test_too_little_data_is_a_clear_error():
    with pytest.raises(ConfigError) as error:
        training(count=7, share=Share(4, 0, 2))
    assert str(error.value) == (
        "data.batch_size: expected at most 7, the number of training rows, found 4 x 2 processes = 8. "
        "Lower it, or give more data."
    )


# --- weights --------------------------------------------------------------------------------------------------------


def readings(loader, epochs):
    """How often each row was read in each epoch; batches of one row leave none out."""
    return [Counter(row for batch in rows(loader) for row in batch) for _ in range(epochs)]


@pytest.mark.parametrize(
    ("weights", "per_epoch"), [((2, 1), 36), ((0.5, 1), 16), ((1.5, 0.3), 22), ((1, 0.01), 14), ((3.0, 2.5), 64)]
)
def test_a_weight_is_how_often_a_row_is_read(weights, per_epoch):
    loader = mixed(*weights, share=Share(1))
    counts = readings(loader, epochs=130)
    assert {sum(count.values()) for count in counts} == {len(loader)} == {per_epoch}
    for file, weight in zip((range(13), range(13, 23)), weights, strict=True):
        low, high = int(weight), -int(-weight // 1)
        assert {count[row] for count in counts for row in file} <= {low, high}  # never twice in a part
        part = max(round(weight % 1 * len(file)), weight < 1)
        totals = [sum(count[row] for count in counts) for row in file]
        assert len(set(totals)) == 1 and totals[0] == 130 * low + 130 * part // len(file)  # all alike


def test_a_part_differs_between_epochs_and_seeds():
    first, second = (frozenset(count) for count in readings(mixed(0.5, 0.5, share=Share(1)), epochs=2))
    assert len(first) == len(second) == 11 and len(first & second) <= 2
    assert readings(mixed(0.5, 0.5, share=Share(1)), 1) == readings(mixed(0.5, 0.5, share=Share(1)), 1)
    assert readings(mixed(0.5, 0.5, share=Share(1), seed=6), 1) != readings(mixed(0.5, 0.5, share=Share(1)), 1)


def test_weighted_rows_are_shuffled_over_the_files():
    order = [row for batch in rows(mixed(2, 1, share=Share(1))) for row in batch]
    assert order != sorted(order) and {row < 13 for row in order[:12]} == {True, False}


def test_a_selection_keeps_each_file_under_its_weight():
    kept = Mixture([*"abcdefg"], (3, 0, 4), (2, 1, 0.5)).select([0, 4, 5, 6])
    assert (list(kept), kept.sizes, kept.weights) == ([*"aefg"], (1, 0, 3), (2, 1, 0.5))
    assert kept.rows_per_epoch == 2 + 2
    assert list(Mixture([1, 2], (1, 1), (2, 1)).select([1]).indices(0, 0)) == [0]  # nothing is left of the first file


# --- questions held out of training ---------------------------------------------------------------------------------


def asked(*texts):
    return [Question(str(i), text, ("a",)) for i, text in enumerate(texts)]


def test_a_fingerprint_knows_support_and_nothing_else_changed():
    plain = asked("who?", "where?")
    assert fingerprint(plain) == "4b363e9dea77", "that of files read before there was support"
    supported = [replace(question, support=("Rome",)) for question in plain]
    assert len({fingerprint(rows) for rows in (plain, supported, [*plain[:1], *supported[1:]])}) == 3
    train, held = hold_out(supported, 1, 0)
    assert [question.support for question in (*train, *held)] == [("Rome",)] * 2


def test_no_held_out_question_is_trained_on_in_any_spelling():
    texts = ["Who  won?", "who won", "WHO WON ?", "Where", "When?", "Straße", "STRASSE?"]
    seen = set()
    for seed in range(20):
        train, held = hold_out(Mixture(asked(*texts), (4, 3), (1, 2)), 2, seed)
        assert len(held) == 2 and not overlap(train, held) and train.weights == (1, 2)
        lost = {"who": 3, "str": 2, "whe": 1}  # rows that ask the same
        assert len(train) == 7 - sum(lost[question.text[:3].casefold()] for question in held)
        assert sum(train.sizes) == len(train)
        seen.add(tuple(question.id for question in held))
    assert len(seen) > 5  # the seed decides
    assert hold_out(asked(*texts), 2, 3)[1] == hold_out(Mixture(asked(*texts), (4, 3), (9, 1)), 2, 3)[1]


def test_a_holdout_leaves_something_to_train_on():
    with pytest.raises(
        ConfigError, match=r"data\.holdout: expected fewer than 2, the number of different .* found 2\."
    ):
        hold_out(asked("a", "b", "B?"), 2, 0)
    assert len(hold_out(asked("a", "b", "B?"), 1, 0)[1]) == 1


def test_overlap_names_the_validation_questions():
    assert overlap(asked("a b?", "c"), asked("x", " A  B ", "c??")) == asked("x", " A  B ", "c??")[1:]


def test_a_fingerprint_tells_contents_and_order():
    one, two = asked("a", "b")
    prints = {
        fingerprint(questions) for questions in ([one, two], [two, one], [one], [replace(one, answers=("b",)), two])
    }
    assert len(prints) == 4 and fingerprint([one, two]) == fingerprint(asked("a", "b"))


# --- ranks ----------------------------------------------------------------------------------------------------------


def test_two_ranks_partition_every_training_batch():
    ranks = [list(training(share=Share(3, rank, 2))) for rank in (0, 1)]
    assert [len(batches) for batches in ranks] == [3, 3]
    for (mine, _), (yours, _) in zip(*ranks, strict=True):
        assert len(mine) == len(yours) == 3 and not set(mine) & set(yours)
    assert len({row for batches in ranks for batch in rows(batches) for row in batch}) == 18


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("count", range(1, 14))
def test_evaluation_drops_and_repeats_nothing(count, world_size):
    questions = [Question(str(i), "q", ("a",)) for i in range(count)]
    ranks = [EvaluationBatches(questions, Share(2, rank, world_size)) for rank in range(world_size)]
    assert len({len(loader) for loader in ranks}) == 1  # collectives of one rank wait for the others
    seen = [
        pair for loader in ranks for batch in loader for pair in zip(batch.questions, batch.instance_ids, strict=True)
    ]
    assert sorted((int(question.id), instance_id) for question, instance_id in seen) == [
        (i, (0, i)) for i in range(count)
    ]
    assert all(len(list(loader)) == len(loader) for loader in ranks)


@pytest.mark.parametrize(
    ("share", "told"), [(Share(5), "5 x 1 processes = 5"), (Share(4, 0, 2), "4 x 2 processes = 8")]
)
def test_a_step_holds_as_many_questions_on_any_number_of_processes(share, told):
    with pytest.raises(ConfigError, match=f"steps hold 4 questions, found {told}. Keep the product"):
        training(share=share).load_state_dict(training().state_dict())
    training(share=Share(2, 1, 2)).load_state_dict(training().state_dict())
