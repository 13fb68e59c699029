import json
import re
import subprocess
import sys
import warnings
from argparse import ArgumentError
from collections import Counter
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from helpers.paths import ROOT
from sdsearch_lightning.datamodules import SearchDataModule
from sdsearch_lightning.errors import ConfigError, DataError
from sdsearch_lightning.types import Demonstration, Passage, Question, StepBatch


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


def test_a_subset_is_drawn_per_source_and_is_the_same_whatever_the_seed(files):
    def subset(split, count, seed=0, **options):
        data = SearchDataModule(
            test_files=list(files.values()), val_files=files["nq"], retriever=OnePassage(), seed=seed,
            limit_per_source=count, **options,
        )  # fmt: skip
        loader = {"test": data.test_dataloader, "val": data.val_dataloader, "predict": data.predict_dataloader}[split]()
        return [(q.source, q.id) for batch in loader for q in batch.questions]

    drawn = subset("test", 4)
    assert Counter(source for source, _ in drawn) == {"nq": 4, "hotpotqa": 4}
    assert drawn == subset("test", 4, seed=7) == subset("predict", 4)
    assert drawn[:4] == subset("val", 4), "a source's draw depends on its own questions alone"
    assert [i for _, i in drawn[:4]] != [str(i) for i in range(4)], "not the first rows"
    assert drawn[:4] == sorted(drawn[:4], key=lambda pair: int(pair[1])), "in the order of the file"
    assert len(subset("test", 12)) == 22, "a source with fewer gives all"
    with pytest.raises(ConfigError, match="data.limit_per_source: expected at least 1, found 0"):
        SearchDataModule(limit_per_source=0)


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


def test_rows_of_weighted_files_come_as_often_as_asked(files):
    weights = {files["nq"]: 2, files["hotpotqa"]: 0.5}
    data = SearchDataModule(train_files=weights, batch_size=31)
    (batch,) = data.train_dataloader()
    counts = Counter(question.text for question in batch.questions)
    assert {counts[f"nq {i} ?"] for i in range(13)} == {2} and len(counts) == 13 + 5
    assert len(data.training_questions) == 23 and len(set(batch.instance_ids)) == 31
    with pytest.raises(ConfigError, match=r"data\.train_files: expected a weight above 0 for 'a', found 0"):
        SearchDataModule(train_files={"a": 0})


def test_columns_name_those_of_own_files_only(files, tmp_path):
    (tmp_path / "nq").mkdir()
    Path(files["nq"]).rename(tmp_path / "nq" / "test.jsonl")
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"q": "mine", "gold": "A"}) + "\n")
    columns = {"question": "q", "answers": "gold"}
    data = SearchDataModule(test_files=["nq", str(own)], columns=columns, hub=str(tmp_path), limit=1)
    assert data.questions("test")[:] == [Question("0", "nq 0 ?", ("0",), "nq"), Question("1", "mine", ("A",), "own")]
    with pytest.raises(DataError, match=r"hotpotqa\.jsonl line 1: expected a value in the column 'q'"):
        SearchDataModule(test_files=files["hotpotqa"], columns=columns).setup("test")
    with pytest.raises(ConfigError, match=r"data\.columns: expected keys among"):
        SearchDataModule(columns={"text": "q"})


def test_support_is_read_of_benchmarks_too(tmp_path):
    (tmp_path / "hotpotqa").mkdir()
    row = {"question": "who ?", "golden_answers": ["A"], "metadata": {"supporting_facts": {"title": ["Rome", "Tiber"]}}}
    (tmp_path / "hotpotqa" / "train.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(row | {'metadata': {}})}\n")
    columns = {"question": "q", "support": "metadata.supporting_facts.title"}
    data = SearchDataModule(train_files="hotpotqa", columns=columns, hub=str(tmp_path), normalization="unicode")
    assert [(q.text, q.support) for q in data.training_questions] == [("who ?", ("Rome", "Tiber")), ("who ?", ())]


def test_held_out_questions_are_validated_and_never_trained_on(files):
    def data(**options):
        return SearchDataModule(train_files=list(files.values()), holdout=5, batch_size=18, **options)

    one = data()
    one.setup("fit")
    held = [question for batch in one.val_dataloader() for question in batch.questions]
    (batch,) = one.train_dataloader()
    assert len(held) == 5 and len(one.training_questions) == 18
    assert len({question.text for question in (*held, *batch.questions)}) == 23
    other = data(seed=1)
    other.setup("validate")
    assert [q for batch in other.val_dataloader() for q in batch.questions] != held
    assert data().questions("train")[:] == one.questions("train")[:] and len(one.questions("train")) == 23


def test_a_holdout_that_cannot_be_is_refused(files):
    with pytest.raises(ConfigError, match=r"data\.holdout: expected 0, or .* without val_files, found 2 beside"):
        SearchDataModule(val_files=files["nq"], holdout=2)
    with pytest.raises(ConfigError, match=r"data\.holdout: expected 0, .* found -1\."):
        SearchDataModule(holdout=-1)
    with pytest.raises(ConfigError, match=r"data\.holdout: expected fewer than 13"):
        SearchDataModule(train_files=files["nq"], holdout=13).setup("fit")
    for stage, option in (("fit", "train"), ("validate", "val")):
        with pytest.raises(ConfigError, match=rf"data\.{option}_files: expected at least one file"):
            SearchDataModule(holdout=2).setup(stage)


def test_validation_that_repeats_training_questions_is_told(files, tmp_path):
    again = tmp_path / "again.jsonl"
    texts = ["NQ  3", "something else", "nq 4?"]
    again.write_text("".join(json.dumps({"question": text, "answers": ["there"]}) + "\n" for text in texts))
    data = SearchDataModule(train_files=files["nq"], val_files=str(again))
    with pytest.warns(UserWarning, match=r"^2 of 3 validation questions are training questions too, such as 'NQ  3'"):
        data.setup("fit")
    SearchDataModule(train_files=files["nq"], val_files=files["hotpotqa"]).setup("fit")  # warnings are errors here
    data.setup("validate")


def test_a_checkpoint_of_other_questions_is_refused(files):
    def loader(path, **options):
        return SearchDataModule(train_files=path, batch_size=4, **options).train_dataloader()

    state = loader(files["nq"]).state_dict()
    loader([files["nq"]]).load_state_dict(state)
    Path(files["nq"]).write_text(Path(files["nq"]).read_text().replace("nq 7 ?", "nq 77 ?"))
    with pytest.raises(ConfigError, match=r"stands in training data with \{'fingerprint': '[0-9a-f]{12}'\}, found"):
        loader(files["nq"]).load_state_dict(state)


def test_the_retriever_is_prepared_and_closed_if_it_can_be(files):
    data = SearchDataModule(val_files=files["nq"], retriever=OnePassage())
    data.prepare_data()
    data.setup("validate")
    data.teardown("validate")
    assert data.retriever.calls == ["prepare", "close"]
    for bare in (None, type("Bare", (), {"search": None})()):
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


# --- the documentation ----------------------------------------------------------------------------------------------

SNIPPETS = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL)


def parse(config):
    """What the command line makes of a configuration file."""
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(SearchDataModule, "data", subclass_mode=True)
    options = parser.parse_object(config).data.init_args.as_dict()
    return SearchDataModule(**options | {"retriever": None})  # whose class and options were read


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_snippet_of_the_documentation_can_be_used(snippet):
    config = yaml.safe_load(snippet)
    made = parse(config)
    assert made.files["train"] or made.files["test"] or made.demonstration_files
    for option in ("holdout", "hub", "limit", "columns", "normalization", "demonstration_top_k"):
        assert getattr(made, option) == config["data"].get(option, getattr(SearchDataModule(), option))


def test_a_snippet_that_cannot_be_used_would_be_noticed():
    assert len(SNIPPETS) == 9
    for wrong in ({"train_file": "a.jsonl"}, {"train_files": {"a.jsonl": "x"}}, {"columns": ["q"]}):
        with pytest.raises(ArgumentError):
            parse({"data": wrong})


def test_questions_carry_the_rule_by_which_their_answers_are_compared(tmp_path):
    path = tmp_path / "signs.jsonl"
    path.write_text(json.dumps({"question": "which?", "golden_answers": ["、"]}) + "\n")
    options = {"train_files": str(path), "retriever": OnePassage(), "batch_size": 1}
    for rule, lost in (("english", 0), ("unicode", 1)):
        data = SearchDataModule(**options, normalization=rule)
        assert [question.normalization for question in data.questions("train")] == [rule]
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            data.setup("fit")
        assert len(told) == lost, "the sign is punctuation, by that rule"
    with pytest.raises(ConfigError, match="normalization: expected one of english, unicode, found 'latin'"):
        SearchDataModule(normalization="latin")


def test_golds_that_vanish_are_counted(tmp_path):
    path = tmp_path / "letters.jsonl"
    golds = (["A"], ["+"], ["The The", "them"], ["B"])
    path.write_text("".join(json.dumps({"question": "which?", "golden_answers": gold}) + "\n" for gold in golds))
    data = SearchDataModule(train_files=[str(path)], retriever=OnePassage(), batch_size=2)
    with pytest.warns(
        UserWarning, match="2 of 4 train questions have gold answers of which normalising leaves nothing"
    ):
        data.setup("fit")
