import signal

import lightning.pytorch as pl
import pytest
import torch

from sdsearch_lightning.callbacks import graceful_stop
from sdsearch_lightning.callbacks.graceful_stop import GracefulStop

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


class Model(pl.LightningModule):
    """Raises the given signals: {step: signal}; a step is a training step, or "val" for validation."""

    def __init__(self, signals):
        super().__init__()
        self.weight, self.signals, self.validations = torch.nn.Parameter(torch.zeros(1)), signals, 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        for number in self.signals.get(batch_idx + 1, ()):
            signal.raise_signal(number)
        return (self.weight - batch).square().sum()

    def validation_step(self, batch, batch_idx):
        self.validations += 1
        for number in self.signals.get("val", ()):
            signal.raise_signal(number)


def trainer_of(stop, folder):
    return pl.Trainer(
        max_steps=6,
        accelerator="cpu",
        logger=False,
        callbacks=[stop],
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        val_check_interval=4,
    )


def loader(size):
    return torch.utils.data.DataLoader(torch.arange(float(size)))


@pytest.fixture(autouse=True)
def handlers_are_restored():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(tmp_path, capfd, number, code):
    model, stop = Model({2: [number]}), GracefulStop(advice="Go on like this.")
    trainer = trainer_of(stop, tmp_path)
    with pytest.raises(SystemExit) as ended:
        trainer.fit(model, loader(8), loader(1))
    assert ended.value.code == code
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    assert model.validations == 0, "stopping must not start a validation"
    lines = [line for line in capfd.readouterr().err.splitlines() if line and not line.startswith("INFO")]
    assert lines == [
        f"{signal.Signals(number).name}: stopping after this step, with a checkpoint. Once more: at once.",
        "stopped after step 2; a checkpoint is saved. Go on like this.",
    ]


def test_a_validation_that_is_due_is_finished_first(tmp_path):
    model, stop = Model({4: [signal.SIGTERM]}), GracefulStop()
    with pytest.raises(SystemExit):
        trainer_of(stop, tmp_path).fit(model, loader(8), loader(3))
    assert model.validations == 3


def test_a_second_signal_ends_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(graceful_stop, "ECHO", 0.0)
    with pytest.raises(SystemExit) as ended:
        trainer_of(GracefulStop(), tmp_path).fit(Model({2: [signal.SIGTERM, signal.SIGINT]}), loader(8), loader(1))
    assert ended.value.code == 130
    assert not (tmp_path / "checkpoints").exists()


def test_a_signal_that_is_told_twice_is_one(tmp_path):
    with pytest.raises(SystemExit) as ended:
        trainer_of(GracefulStop(), tmp_path).fit(Model({2: [signal.SIGINT, signal.SIGTERM]}), loader(8), loader(1))
    assert ended.value.code == 130
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


def test_outside_training_the_first_signal_ends_at_once(tmp_path, capfd):
    with pytest.raises(SystemExit) as ended:
        trainer_of(GracefulStop(), tmp_path).validate(Model({"val": [signal.SIGTERM]}), loader(2), verbose=False)
    assert ended.value.code == 143
    assert "nothing to save" in capfd.readouterr().err


def test_the_given_save_is_used_and_the_last_step_leaves_the_decision_to_the_caller(tmp_path):
    saved = []
    stop = GracefulStop(save=lambda: saved.append("now"))
    trainer_of(stop, tmp_path).fit(Model({6: [signal.SIGTERM]}), loader(8), loader(1))
    assert saved == ["now"] and stop.is_stopping and stop.exit_code == 143


def test_without_a_signal_nothing_happens(tmp_path):
    stop = GracefulStop()
    trainer = trainer_of(stop, tmp_path)
    trainer.fit(Model({}), loader(8), loader(1))
    assert trainer.global_step == 6 and not stop.is_stopping


def test_the_handlers_before_it_are_put_back_by_itself():
    """Lightning would put back its own, older ones, but only after its teardown."""
    mine = [lambda *_: None, lambda *_: None]
    numbers = (signal.SIGTERM, signal.SIGINT)
    old = [signal.signal(number, handler) for number, handler in zip(numbers, mine, strict=True)]
    try:
        stop = GracefulStop()
        stop.on_train_start(pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"), Model({}))
        assert signal.getsignal(signal.SIGTERM) not in mine
        stop.on_train_end(None, None)
        assert [signal.getsignal(number) for number in numbers] == mine
    finally:
        for number, handler in zip(numbers, old, strict=True):
            signal.signal(number, handler)
