"""A command takes its run folder once: before its first step, or at the end where no step is left."""

import lightning.pytorch as pl
import pytest
import torch

from sdsearch_lightning.callbacks.run_start import RunStart


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
