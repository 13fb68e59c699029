"""What TensorBoard, Weights & Biases (offline) and MLflow get of a run: hyperparameters, and metrics by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger

from helpers.fits import DrawnScripts, ToyData, grouping
from helpers.models import tiny_model
from helpers.training_rollouts import TRAINING_PROTOCOL, TRAINING_TOKENIZER
from sdsearch_lightning import SDSearchModule
from sdsearch_lightning.callbacks import HindsightConstruction, JSDWeightScheduler
from sdsearch_lightning.policy.loading import ScratchModel

pytestmark = pytest.mark.filterwarnings("ignore")  # of other people's packages


def train(logger: Any) -> None:
    module = SDSearchModule(
        scratch=ScratchModel(), protocol=TRAINING_PROTOCOL, optimizer=lambda params: torch.optim.SGD(params, lr=1e-2)
    )
    module.attach(tiny_model(), TRAINING_TOKENIZER)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        max_steps=2,
        callbacks=[grouping(DrawnScripts()), HindsightConstruction(), JSDWeightScheduler(0.3, 0)],
    )
    trainer.fit(module, datamodule=ToyData())


def test_tensorboard(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="extra `loggers`")
    logger = TensorBoardLogger(tmp_path)
    train(logger)
    found = events.EventAccumulator(logger.log_dir)
    found.Reload()
    assert [event.step for event in found.Scalars("distill/jsd")] == [0, 1]
    assert "kl_coef: 0.001" in (Path(logger.log_dir) / "hparams.yaml").read_text()


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="extra `loggers`")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="sdsearch")
    train(logger)
    config, summary = dict(logger.experiment.config), dict(logger.experiment.summary)
    wandb.finish()
    assert (config["kl_coef"], config["divergence"]) == (0.001, "JensenShannon")
    assert summary["distill/jsd"] > 0 and list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="extra `loggers`")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("sdsearch", tracking_uri=f"file:{tmp_path}/mlruns")
    train(logger)
    run = logger.experiment.get_run(logger.run_id)
    assert (run.data.params["kl_coef"], run.data.params["divergence"]) == ("0.001", "JensenShannon")
    assert run.data.metrics["distill/jsd"] > 0
    assert [m.step for m in logger.experiment.get_metric_history(logger.run_id, "distill/jsd")] == [0, 1]
