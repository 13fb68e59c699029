"""A fit on two processes whose rank 1 alone sees a collapse; each rank writes where it stopped.

python health_two_ranks.py FOLDER
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))
warnings.filterwarnings("ignore", ".*does not have many workers")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

import lightning.pytorch as pl  # noqa: E402
import torch  # noqa: E402

from sdsearch_lightning.__main__ import end_process  # noqa: E402
from sdsearch_lightning.callbacks import TrainingHealth  # noqa: E402


class Model(pl.LightningModule):
    """KL .1 on rank 0; on rank 1 as well, but 3 from step 4 on. The JSD is logged by rank 1 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        is_second = self.global_rank == 1
        self.log("train/kl", 3.0 if is_second and self.global_step >= 3 else 0.1)
        if is_second:
            self.log("distill/jsd", 0.05)
        return (self.weight - batch).square().sum()


def main(folder: str) -> None:
    torch.set_num_threads(1)
    health = TrainingHealth("stop")
    trainer = pl.Trainer(
        max_steps=12,
        accelerator="cpu",
        strategy="ddp",
        devices=2,
        logger=False,
        callbacks=[health],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Model(), torch.utils.data.DataLoader(torch.ones(24)))
    found = {"step": trainer.global_step, "state": health.state_dict()}
    (Path(folder) / f"rank{trainer.global_rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
    end_process(0)
