from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, IterableDataset

from helpers.disks import small_disk
from helpers.reports import WordTokenizer, city_rollout, credit, read_lines
from sdsearch_lightning.callbacks.trajectory_log import TrajectoryLog
from sdsearch_lightning.errors import ConfigError, StorageError
from sdsearch_lightning.report import read_trajectories
from sdsearch_lightning.report.trajectories import cut_after
from sdsearch_lightning.types import HindsightBlock, Question, RolloutGroup, StepBatch, TeacherView

QUESTION = Question("q0", "where is Rome ?", ("Rome",), "toy")


class Batches(IterableDataset[StepBatch]):
    """Two questions a batch."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[StepBatch]:
        for batch in range(self.count):
            yield StepBatch([QUESTION] * 2, [(0, 2 * batch), (0, 2 * batch + 1)])


class Module(LightningModule):
    """Fills the slots as the callbacks and the module of a real run do, and takes one optimizer step per batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.tokenizer = WordTokenizer()

    def fill(self, batch: StepBatch, num_rollouts: int) -> None:
        batch.groups = groups(batch, num_rollouts)

    def block(self, batch: StepBatch) -> HindsightBlock:
        return HindsightBlock(batch.instance_ids[0], (), "told")

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        self.fill(batch, 2)
        batch.hindsight = (self.block(batch), None)
        assert batch.groups is not None
        batch.credit = (tuple(credit(t) for t in batch.groups[0].trajectories), (None, None))
        optimizer: Any = self.optimizers()
        optimizer.step()

    def validation_step(self, batch: StepBatch, batch_idx: int) -> None:
        self.fill(batch, 1)
        batch.sampled_groups = groups(batch, 2)

    def test_step(self, batch: StepBatch, batch_idx: int) -> None:
        self.fill(batch, 1)

    def predict_step(self, batch: StepBatch, batch_idx: int) -> None:
        self.fill(batch, 1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def groups(batch: StepBatch, num_rollouts: int) -> tuple[RolloutGroup, ...]:
    return tuple(
        RolloutGroup(QUESTION, i, tuple(city_rollout(instance_id=i, index=index) for index in range(num_rollouts)))
        for i in batch.instance_ids
    )


def loader(count: int) -> DataLoader[StepBatch]:
    return DataLoader(Batches(count), batch_size=None)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Any:
    def make(log: TrajectoryLog, **options: Any) -> Trainer:
        return Trainer(
            default_root_dir=tmp_path,
            accelerator="cpu",
            callbacks=[log],
            logger=False,
            barebones=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )

    return make


def fit(trainer: Trainer, *, train: int, val: int) -> None:
    # A sanity check of every batch stands for the validation before the first step.
    trainer.fit(Module(), loader(train), loader(val))


FIT = {"max_steps": 3, "num_sanity_val_steps": -1, "val_check_interval": 1}


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # Lightning's advice on loaders and workers
def test_a_fit_writes_every_rollout_with_step_block_and_credit(make_trainer: Any, tmp_path: Path) -> None:
    fit(make_trainer(TrajectoryLog(val_questions=1), **FIT), train=3, val=2)
    records = read_lines(tmp_path / "trajectories.jsonl")
    train = [r for r in records if r["phase"] == "train"]
    assert [(r["step"], r["instance_id"], r["rollout_index"]) for r in train] == [
        (step + 1, [0, 2 * step + group], index) for step in range(3) for group in range(2) for index in range(2)
    ]
    assert [r["block"] for r in train[:4]] == ["told", "told", None, None]
    assert [r["credit"] is None for r in train[:4]] == [False, False, True, True]

    def positions(phase: str) -> dict[int, list[int]]:
        chosen = [r for r in records if r["phase"] == phase]
        return {
            step: [r["instance_id"][1] for r in chosen if r["step"] == step] for step in {r["step"] for r in chosen}
        }

    assert positions("val") == {0: [0, 1, 2, 3], 1: [0], 2: [0], 3: [0, 1, 2, 3]}  # first and last one: all questions
    assert positions("val_sampled")[1] == [0, 0]
    assert all(r["block"] is None and r["credit"] is None for r in records if r["phase"] != "train")


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_each_rollout_has_the_text_that_its_own_teacher_read(
    make_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def views(self: Module, batch: StepBatch) -> HindsightBlock:
        told = (TeacherView(1, 0, "first;"), TeacherView(1, 1, "second;"))
        return HindsightBlock(batch.instance_ids[0], (), "", views=told)

    monkeypatch.setattr(Module, "block", views)
    fit(make_trainer(TrajectoryLog(), **FIT), train=1, val=0)
    records = read_lines(tmp_path / "trajectories.jsonl")
    assert [r["block"] for r in records[:4]] == [None, "first;second;", None, None]


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_training_rollouts_can_be_thinned(make_trainer: Any, tmp_path: Path) -> None:
    fit(make_trainer(TrajectoryLog(every_n_steps=2, max_per_step=3), **FIT), train=3, val=0)
    assert [r["step"] for r in read_lines(tmp_path / "trajectories.jsonl")] == [1, 1, 1, 3, 3, 3]


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_validate_test_and_predict_write_everything(make_trainer: Any, tmp_path: Path) -> None:
    log = TrajectoryLog(path=str(tmp_path / "elsewhere" / "all.jsonl"), val_questions=0)
    trainer = make_trainer(log)
    module = Module()
    trainer.validate(module, loader(1), verbose=False)
    trainer.test(module, loader(1), verbose=False)
    trainer.predict(module, loader(1))
    phases = [r["phase"] for r in read_lines(tmp_path / "elsewhere" / "all.jsonl")]
    assert phases == ["val"] * 2 + ["val_sampled"] * 4 + ["test"] * 2 + ["predict"] * 2


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_a_resumed_run_cuts_the_torn_line_and_appends(make_trainer: Any, tmp_path: Path) -> None:
    path = tmp_path / "trajectories.jsonl"
    fit(make_trainer(TrajectoryLog(), **FIT), train=3, val=0)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])  # killed inside the last line
    fit(make_trainer(TrajectoryLog(), **FIT), train=3, val=0)
    assert path.read_bytes() == whole[: whole.rstrip(b"\n").rfind(b"\n") + 1] + whole
    assert len(list(read_trajectories(path))) == 12


class Save(Callback):
    """A checkpoint after the second step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_a_resumed_run_goes_on_with_the_next_step_and_writes_none_twice(make_trainer: Any, tmp_path: Path) -> None:
    path, checkpoint = tmp_path / "trajectories.jsonl", tmp_path / "two.ckpt"
    options = FIT | {"max_steps": 5, "limit_val_batches": 0}
    trainer = make_trainer(TrajectoryLog(), **options | {"max_steps": 3})
    trainer.callbacks.append(Save(checkpoint))
    fit(trainer, train=5, val=0)
    assert [r["step"] for r in read_lines(path)] == [1] * 4 + [2] * 4 + [3] * 4
    cut_after(path, 2)  # what the checkpoint does not know of, as the command line does
    resumed = make_trainer(TrajectoryLog(), **options)
    resumed.fit(Module(), loader(5), loader(0), ckpt_path=checkpoint)
    assert [r["step"] for r in read_lines(path)] == [step for step in (1, 2, 3, 4, 5) for _ in range(4)]


class Ranked:
    """The attributes of a trainer that the log reads."""

    global_rank = 2
    global_step = 1
    strategy = SimpleNamespace(reduce_boolean_decision=lambda value, all: value)

    def __init__(self, folder: Path) -> None:
        self.default_root_dir = str(folder)


def test_other_ranks_write_their_own_file_and_demonstrations_are_skipped(tmp_path: Path) -> None:
    module = Module()
    batch = StepBatch([QUESTION])
    batch.groups = groups(batch, 1)
    trainer: Any = Ranked(tmp_path)
    log = TrajectoryLog()
    log.on_train_batch_end(trainer, module, None, ["a demonstration"], 0)
    log.on_train_batch_end(trainer, module, None, StepBatch([QUESTION]), 0)
    assert list(tmp_path.iterdir()) == []
    log.on_train_batch_end(trainer, module, None, batch, 0)
    (record,) = read_lines(tmp_path / "trajectories.rank2.jsonl")
    assert (record["rank"], record["step"]) == (2, 1)


def test_every_n_steps_is_checked() -> None:
    with pytest.raises(ConfigError, match="every_n_steps: expected 1 or more, got 0"):
        TrajectoryLog(every_n_steps=0)


def test_a_full_disk_ends_the_run_where_all_ranks_meet(tmp_path: Path) -> None:
    """An evaluation has not as many batches on each rank: it goes on to its end first."""
    module, batch = Module(), StepBatch([QUESTION])
    batch.groups = groups(batch, 1)
    with small_disk(tmp_path / "disk", 16) as disk:
        (disk / "ballast").write_bytes(bytes(12 * 1024))
        trainer: Any = Ranked(disk)
        log = TrajectoryLog()
        for _ in range(4):
            log.on_test_batch_end(trainer, module, None, batch, 0)
        with pytest.raises(StorageError) as raised:
            log.on_test_end(trainer, module)
        told = str(raised.value)
        assert told.startswith(f"{disk}/trajectories.rank2.jsonl could not be written: No space left on device (")
        assert told.endswith("Free some space and run the same command again.") and "\n" not in told


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_a_large_file_is_packed_between_two_batches(make_trainer: Any, tmp_path: Path) -> None:
    path = tmp_path / "trajectories.jsonl"
    fit(make_trainer(TrajectoryLog(segment_mb=1e-3), **FIT), train=3, val=0)
    assert path.read_bytes() == b"" and len(list(tmp_path.glob("trajectories.0000?.jsonl.gz"))) == 3
    assert [r["step"] for r in read_trajectories(path)] == [1] * 4 + [2] * 4 + [3] * 4


def test_segment_mb_is_checked() -> None:
    with pytest.raises(ConfigError, match="segment_mb: expected a size above 0 MB or null for no segments, got 0"):
        TrajectoryLog(segment_mb=0)
