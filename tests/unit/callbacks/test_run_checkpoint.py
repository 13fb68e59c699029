"""The record of a short run: when a checkpoint counts, and which step a row of metrics is of."""

import csv

import lightning.pytorch as pl
import pytest
import torch

from sdsearch_lightning.callbacks.run_checkpoint import RunCheckpoint, StepBoundary
from sdsearch_lightning.runs.folder import RunOptions
from sdsearch_lightning.runs.metrics_logger import MetricsLogger


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Model(pl.LightningModule):
    """Logs `train/even` in even steps only; validates after each second batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward((self.weight - batch).square().sum())
        optimizer.step()
        self.log("train/weight", self.weight.detach())
        if self.trainer.global_step % 2 == 0:
            self.log("train/even", float(self.trainer.global_step))

    def validation_step(self, batch, batch_idx):
        self.log("val/weight", self.weight.detach(), batch_size=1)


class Probe(pl.Callback):
    """Notes what is on disk at the start of each step's long work."""

    def __init__(self, folder):
        self.folder, self.seen, self.seen_in_validation = folder, [], []

    def published(self):
        last = self.folder / "checkpoints" / "last.ckpt"
        return last.readlink().stem if last.is_symlink() else None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append((trainer.global_step, self.published()))

    def on_validation_start(self, trainer, pl_module):
        self.seen_in_validation.append((trainer.global_step, self.published()))


@pytest.fixture
def trained(tmp_path):
    return train(tmp_path)


def train(tmp_path, **options):
    checkpoint, logger, probe = (
        RunCheckpoint(tmp_path / "checkpoints", RunOptions(checkpoint_every=2, **options)),
        MetricsLogger(tmp_path / "metrics.csv"),
        Probe(tmp_path),
    )
    trainer = pl.Trainer(
        max_steps=7,
        accelerator="cpu",
        logger=logger,
        callbacks=[StepBoundary(checkpoint), probe, checkpoint],
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        log_every_n_steps=1,
    )
    logger.trainer = trainer
    data = torch.utils.data.DataLoader(torch.arange(10.0))
    trainer.fit(Model(), data, torch.utils.data.DataLoader(torch.zeros(1)))
    return tmp_path, probe, checkpoint


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
class TestTraining:
    def test_step_is_the_global_step_and_shared_by_a_step_and_its_validation(self, trained):
        rows = read(trained[0] / "metrics.csv")
        assert [row["step"] for row in rows if row["train/weight"]] == list("1234567")
        assert [row["step"] for row in rows if row["val/weight"]] == list("246")

    def test_a_value_that_a_step_does_not_log_is_not_repeated(self, trained):
        rows = read(trained[0] / "metrics.csv")
        assert {row["step"] for row in rows if row["train/even"]} == set("246")

    def test_a_checkpoint_counts_only_once_its_step_is_written_and_before_the_next_long_work(self, trained):
        expected = [None, None, "step_00000002", "step_00000002", "step_00000004", "step_00000004", "step_00000006"]
        assert trained[1].seen == list(enumerate(expected))
        assert trained[1].seen_in_validation == [(2, None), (4, "step_00000002"), (6, "step_00000004")]

    def test_the_last_step_is_saved_whatever_its_number_and_two_files_are_kept(self, trained):
        files = sorted(path.name for path in (trained[0] / "checkpoints").iterdir())
        assert files == ["last.ckpt", "step_00000006.ckpt", "step_00000007.ckpt"]
        assert torch.load(trained[0] / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 7

    @pytest.mark.parametrize(
        ("options", "steps"),
        [
            ({"checkpoint_keep": 1}, [7]),
            ({"checkpoint_keep": 3}, [4, 6, 7]),
            ({"checkpoint_keep": 1, "checkpoint_keep_every": 4}, [4, 7]),
            ({"checkpoint_keep_every": 2}, [2, 4, 6, 7]),
        ],
    )
    def test_which_checkpoints_stay_is_a_choice(self, tmp_path, options, steps):
        folder = train(tmp_path, **options)[0] / "checkpoints"
        assert sorted(path.name for path in folder.glob("step_*")) == [f"step_{step:08d}.ckpt" for step in steps]

    def test_seconds_go_on_after_a_resume(self, trained):
        resumed = RunCheckpoint(trained[0], RunOptions())
        resumed.load_state_dict({"seconds": 100.0})
        assert 100.0 <= resumed.seconds < 101.0
        assert resumed.state_dict()["seconds"] >= 100.0
