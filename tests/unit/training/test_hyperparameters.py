"""What a module says of its own arguments: all of them to loggers, plain ones to checkpoints."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from helpers.fits import DrawnScripts, ToyData, fit, grouping
from helpers.models import tiny_model
from helpers.training_rollouts import TRAINING_PROTOCOL, TRAINING_TOKENIZER
from sdsearch_lightning import SDSearchModule, SupervisedModule
from sdsearch_lightning.callbacks import HindsightConstruction, JSDWeightScheduler
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.losses.weights import EntropyCoefs
from sdsearch_lightning.policy.loading import ScratchModel


def test_loggers_are_told_all_of_it_and_checkpoints_what_is_plain() -> None:
    module = SDSearchModule("runs/a/model", clip_low=0.1, entropy_coef=EntropyCoefs(query=-0.5), seed=7)
    told = dict(module.hparams_initial)
    assert (told["model_name_or_path"], told["clip_low"], told["seed"]) == ("runs/a/model", 0.1, 7)
    assert told["entropy_coef"]["query"] == -0.5 and told["divergence"] == "JensenShannon"
    assert module.hparams["clip_low"] == 0.1 and module.hparams["model_name_or_path"] == "runs/a/model"
    assert not {"divergence", "entropy_coef", "optimizer", "args", "options", "self"} & set(module.hparams)


def test_the_cold_start_tells_its_own() -> None:
    module = SupervisedModule(scratch=ScratchModel("llama"), gradient_clip_val=0.5)
    assert module.hparams["gradient_clip_val"] == 0.5 and module.hparams["model_name_or_path"] is None
    assert module.hparams_initial["scratch"]["model_type"] == "llama"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    TRAINING_TOKENIZER.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_checkpoint_loads_by_itself_but_for_objects(folder: Path, tmp_path: Path) -> None:
    module = SDSearchModule(
        str(folder),
        protocol=TRAINING_PROTOCOL,
        optimizer=lambda params: torch.optim.SGD(params, lr=1e-1),
        clip_low=0.1,
    )
    trainer = fit(module, grouping(DrawnScripts()), HindsightConstruction(), JSDWeightScheduler(0.3, 0))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = SDSearchModule.load_from_checkpoint(tmp_path / "a.ckpt", protocol=TRAINING_PROTOCOL, weights_only=True)
    assert loaded.policy_terms.clip_low == 0.1 and loaded.model_name_or_path == str(folder)
    trained, again = module.policy.state_dict(), loaded.policy.state_dict()
    assert trained.keys() == again.keys() and all(torch.equal(trained[name], again[name]) for name in trained)
    start = SDSearchModule(str(folder), protocol=TRAINING_PROTOCOL)
    start.configure_model()
    assert any(not torch.equal(value, again[name]) for name, value in start.policy.state_dict().items())


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_a_loader_in_place_of_a_data_module_is_told(folder: Path) -> None:
    module = SDSearchModule(str(folder), protocol=TRAINING_PROTOCOL)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        max_epochs=1,
        limit_val_batches=0,
        callbacks=[grouping()],
    )
    with pytest.raises(ConfigError, match=r"expected datamodule=SearchDataModule\(\.\.\.\)"):
        trainer.fit(module, [{"question": "who"}])


def made(folder: Path) -> SDSearchModule:
    return SDSearchModule(str(folder), protocol=TRAINING_PROTOCOL, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))


def test_hindsight_without_a_weight_is_told(folder: Path) -> None:
    with pytest.warns(UserWarning, match="no JSDWeightScheduler is among the trainer's callbacks"):
        fit(made(folder), grouping(DrawnScripts()), HindsightConstruction(), data=ToyData())


def test_a_weight_without_hindsight_is_told_before_the_first_rollout(folder: Path) -> None:
    with (
        pytest.warns(UserWarning, match="no HindsightConstruction is among the trainer's callbacks"),
        pytest.raises(RuntimeError, match="HindsightConstruction has to fill it first"),
    ):
        fit(made(folder), grouping(DrawnScripts()), JSDWeightScheduler(0.3, 0), data=ToyData())
