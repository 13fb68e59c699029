"""A command takes its run folder once: before its first step, or at the end where no step is left."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

from sdsearch_lightning.callbacks import CreditDiagnostics, RolloutGrouping
from sdsearch_lightning.callbacks.run_start import QuestionsFirst, RunStart
from sdsearch_lightning.datamodules import SearchDataModule
from sdsearch_lightning.errors import ConfigError, DataError
from sdsearch_lightning.scoring.query_credit import SupportEvidence
from sdsearch_lightning.types import Question


class Model(pl.LightningModule):
    """Notes what is taken when a step begins."""

    def __init__(self, taken):
        super().__init__()
        self.weight, self.taken, self.seen = torch.nn.Parameter(torch.zeros(1)), taken, []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        self.seen.append(list(self.taken))
        return self.weight.sum()


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*GPU", "ignore:.*stopped")
@pytest.mark.parametrize("steps", [0, 2])
def test_the_folder_is_taken_once_and_before_the_first_step(steps, tmp_path):
    taken = []
    model = Model(taken)
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[RunStart(lambda: taken.append("taken"))], default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader(torch.arange(2.0)))
    assert taken == ["taken"] and model.seen == [["taken"]] * steps


@pytest.mark.parametrize(
    "made", [lambda: RolloutGrouping(credit=SupportEvidence()), lambda: CreditDiagnostics(SupportEvidence())]
)
def test_training_questions_are_looked_at_before_the_first_evaluation(made, tmp_path):
    bare, asked = Question("q0", "who ?", ("A",)), Question("q1", "who ?", ("A",), support=("Rome",))

    def look(questions, stage="validate"):
        trainer = SimpleNamespace(
            datamodule=SimpleNamespace(training_questions=questions), callbacks=[made(), object()]
        )
        QuestionsFirst().setup(trainer, None, stage)

    look([bare, asked])
    look([bare], "test")
    with pytest.raises(ConfigError, match="SupportEvidence: expected training questions"):
        look([bare])
    broken = tmp_path / "train.jsonl"
    broken.write_text("{}\n")
    with pytest.raises(DataError, match=r"train\.jsonl line 1: expected a text"):
        look_at = SimpleNamespace(datamodule=SearchDataModule(train_files=str(broken)), callbacks=[])
        QuestionsFirst().setup(look_at, None, "validate")
