import json
import subprocess
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from sdsearch_lightning.datamodules import SearchDataModule
from sdsearch_lightning.datamodules.questions import EvaluationBatches, Share, TrainingBatches
from sdsearch_lightning.errors import ConfigError, DataError
from sdsearch_lightning.types import Demonstration, Passage, Question, StepBatch

ROOT = Path(__file__).parents[2]


class OnePassage:
    """A retriever by look only, which counts what is asked of it."""

    def __init__(self):
        self.calls = []

    def prepare(self):
        self.calls.append("prepare")

    def search(self, queries, k):
        return [[Passage("1", "one")] for _ in queries]

    def close(self):
        self.calls.append("close")


@pytest.fixture
def files(tmp_path):
    """Two sources whose ids collide, as those of the merged Search-R1 files do."""
    made = {}
    for name, count in (("nq", 13), ("hotpotqa", 10)):
        made[name] = tmp_path / f"{name}.jsonl"
        rows = [{"id": i, "question": f"{name} {i} ?", "golden_answers": [str(i)]} for i in range(count)]
        made[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(path) for name, path in made.items()}


def rows(batches):
    return [batch for batch, _ in batches]


def training(count=23, share=None, seed=5):
    return TrainingBatches(range(count), lambda rows, ids: (tuple(rows), tuple(ids)), share or Share(4), seed)


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


@pytest.mark.parametrize("done", range(16))
def test_resuming_anywhere_equals_going_on(done):
    def endless(loader):
        while True:
            yield from loader

    stream, loader = endless(full := training()), training()
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


@pytest.mark.parametrize("other", [{"count": 24}, {"seed": 6}, {"share": Share(5)}, {"share": Share(4, 0, 2)}])
def test_a_checkpoint_of_other_data_is_refused(other):
    with pytest.raises(ConfigError, match=r"stands in training data with .*'rows_per_step': 4.* found "):
        training(**other).load_state_dict(training().state_dict())


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


# --- the data module ------------------------------------------------------------------------------------------------


def test_questions_of_all_files_and_colliding_ids(files):
    data = SearchDataModule(train_files=[files["nq"], files["hotpotqa"]], retriever=OnePassage(), batch_size=23)
    (batch,) = data.train_dataloader()
    assert isinstance(batch, StepBatch) and len(batch) == len(set(batch.instance_ids)) == 23
    assert len({question.id for question in batch.questions}) == 13  # as groups they would have merged
    assert {(q.source, q.id) for q in batch.questions} == {("nq", str(i)) for i in range(13)} | {
        ("hotpotqa", str(i)) for i in range(10)
    }


def test_evaluation_serves_every_row_in_order(files):
    data = SearchDataModule(val_files=files["nq"], test_files=list(files.values()), eval_batch_size=4)
    assert [q.id for batch in data.val_dataloader() for q in batch.questions] == [str(i) for i in range(13)]
    for loader in (data.test_dataloader(), data.predict_dataloader()):
        assert sum(map(len, loader)) == 23 and [len(batch) for batch in loader][-1] == 3
    assert SearchDataModule().val_dataloader() == []


def test_limit_takes_the_head_of_each_file(files):
    data = SearchDataModule(test_files=list(files.values()), limit=2)
    assert [q.text for q in data.questions("test")] == ["nq 0 ?", "nq 1 ?", "hotpotqa 0 ?", "hotpotqa 1 ?"]


def test_the_retriever_is_prepared_and_closed_if_it_can_be(files):
    data = SearchDataModule(val_files=files["nq"], retriever=OnePassage())
    data.prepare_data()
    data.setup("validate")
    data.teardown("validate")
    assert data.retriever.calls == ["prepare", "close"]
    for bare in (None, object()):
        data = SearchDataModule(val_files=files["nq"], retriever=bare)
        data.prepare_data()
        data.teardown("validate")


@pytest.mark.parametrize(
    ("stage", "option"), [("fit", "train"), ("validate", "val"), ("test", "test"), ("predict", "test")]
)
def test_setup_names_what_is_missing(files, stage, option):
    with pytest.raises(ConfigError, match=rf"^data\.{option}_files: expected at least one file for this command"):
        SearchDataModule(retriever=OnePassage()).setup(stage)


def test_bad_files_and_numbers(files, tmp_path):
    nowhere = str(tmp_path / "nowhere.jsonl")
    for options in ({"train_files": nowhere}, {"train_files": files["nq"], "val_files": nowhere}):
        with pytest.raises(DataError, match=r"nowhere\.jsonl, found nothing"):
            SearchDataModule(**options).setup("fit")
    for name in ("batch_size", "eval_batch_size", "limit"):
        with pytest.raises(ConfigError, match=rf"data\.{name}: expected at least 1, found 0"):
            SearchDataModule(**{name: 0})


def test_the_bare_folder_cannot_be_imported():
    code = "import datamodules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "ImportError: import this package as sdsearch_lightning.datamodules" in done.stderr


# --- through Lightning ----------------------------------------------------------------------------------------------


class Recorder(pl.LightningModule):
    """Notes every batch it is given."""

    def __init__(self, learns_from="questions"):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.learns_from, self.seen, self.validated = learns_from, [], 0

    def training_step(self, batch, batch_index):
        self.seen.append(getattr(batch, "instance_ids", None) or [row.question.text for row in batch])
        return self.weight.sum()

    def validation_step(self, batch, batch_index):
        self.validated += len(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, folder, max_steps, resume=None, learns_from="questions", **options):
    module = Recorder(learns_from)
    saver = pl.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of checkpoints, workers and the like: Lightning's own business
        trainer = pl.Trainer(
            max_steps=max_steps, callbacks=[saver], logger=False, accelerator="cpu", enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False, **options,
        )  # fmt: skip
        trainer.fit(module, datamodule=data, ckpt_path=resume)
    return module


@pytest.mark.parametrize("validates", [False, True])
def test_lightning_resumes_exactly_from_every_step(files, tmp_path, validates):
    def data():
        options = {"val_files": files["hotpotqa"]} if validates else {}
        return SearchDataModule(train_files=files["nq"], retriever=OnePassage(), batch_size=4, seed=3, **options)

    whole = fit(data(), tmp_path / "whole", max_steps=8)  # 3 steps per epoch
    assert len({tuple(ids) for ids in whole.seen}) == 8 and whole.seen[3][0] == (1, 0)
    assert whole.validated == (20 if validates else 0)
    for step in (1, 3, 4, 6):  # inside and at the end of epochs
        resumed = fit(data(), tmp_path / f"from{step}", 8, resume=tmp_path / "whole" / f"step={step}.ckpt")
        assert resumed.seen == whole.seen[step:]


def test_lightning_announces_epochs_that_it_cuts_short(files, tmp_path):
    data = SearchDataModule(train_files=files["nq"], retriever=OnePassage(), batch_size=4)
    module = fit(data, tmp_path, max_steps=6, limit_train_batches=2)  # of 3
    starts = [ids[0] for ids in module.seen]
    assert starts == [(0, 0), (0, 4), (1, 0), (1, 4), (2, 0), (2, 4)]


def test_a_module_that_learns_from_demonstrations_gets_them(files, tmp_path):
    path = tmp_path / "demos.jsonl"
    row = {"answers": ["A"], "turns": [["ANSWER", "A"]]}
    path.write_text("".join(json.dumps(row | {"question": f"q{i}"}) + "\n" for i in range(6)))
    data = SearchDataModule(demonstration_files=str(path), batch_size=3)  # neither questions nor a retriever
    (module, half) = (
        fit(data, tmp_path / name, 2, learns_from="demonstrations", precision=precision)
        for name, precision in (("a", "32-true"), ("b", "bf16-true"))
    )
    assert sorted(sum(module.seen, [])) == [f"q{i}" for i in range(6)] and half.seen == module.seen
    assert module.seen != [["q0", "q1", "q2"], ["q3", "q4", "q5"]]

    class Curriculum(SearchDataModule):
        shuffle_demonstrations = False

        def demonstrations(self):
            return [Demonstration(Question(str(i), f"q{i}", ("a",)), ()) for i in range(6)]

    module = fit(Curriculum(batch_size=3), tmp_path / "c", 2, learns_from="demonstrations")
    assert module.seen == [["q0", "q1", "q2"], ["q3", "q4", "q5"]]
    with pytest.raises(
        ConfigError, match=r"data\.demonstration_files: expected at least one file for this command, found none"
    ):
        fit(SearchDataModule(), tmp_path / "d", 2, learns_from="demonstrations")
