"""SD-Search from Python, on the embedded world: a cold start, training, answers. No file of settings, no download.

    python examples/python_api.py [--cold_start_steps 500] [--steps 40] [--output runs/python_api]

A pretrained model takes the place of `scratch` (a Hugging Face folder or name), `SearchDataModule` with your files and
retriever that of the world, and `protocol="search_r1"` that of the world's texts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning as L
import torch

from sdsearch_lightning import SDSearchModule, SupervisedModule
from sdsearch_lightning.callbacks import HindsightConstruction, JSDWeightScheduler, RolloutGrouping, RunProgress
from sdsearch_lightning.datamodules import SyntheticWorldDataModule
from sdsearch_lightning.policy.loading import ScratchModel
from sdsearch_lightning.protocol import BlockTemplates, Protocol
from sdsearch_lightning.scoring.rewards import ExactMatchReward
from sdsearch_lightning.training.options import OptimizerSpec

PROTOCOL = Protocol(
    prompt="{question}",
    question_mark=False,
    documents_tag="documents",
    passage_template="{contents}\n",
    invalid_message=" invalid action ",
    block=BlockTemplates(
        header=" siblings",
        entry="",
        query=" {label} {query} ;",
        judged_query=" {label} {query} ;",
        no_query="",
    ),
)
"""The world's texts: a question is the whole prompt, passages stand bare, the label comes before every query."""
MODEL = ScratchModel(
    "llama",
    {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "intermediate_size": 192,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "initializer_range": 0.125,
    },
)


def trainer(steps: int, *callbacks: L.Callback) -> L.Trainer:
    """A trainer for steps of whole batches, which the data module deals out to processes by itself."""
    return L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[*callbacks, RunProgress()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )


def cold_start(steps: int, folder: Path) -> None:
    """Teach a new model the protocol, and to read hindsight blocks, from written rollouts."""
    module = SupervisedModule(
        scratch=MODEL,
        protocol=PROTOCOL,
        optimizers=[
            OptimizerSpec(lambda params: torch.optim.Muon(params, lr=0.015, weight_decay=0.01), "layers.*proj.weight"),
            OptimizerSpec(lambda params: torch.optim.AdamW(params, lr=3e-3, betas=(0.9, 0.95))),
        ],
        max_micro_batch_tokens=4096,
    )
    data = SyntheticWorldDataModule(batch_size=32, num_demonstrations=32 * steps)
    trainer(steps).fit(module, datamodule=data)
    module.save_pretrained(folder)


def train(steps: int, model: Path, checkpoint: Path) -> None:
    """GRPO with hindsight self-distillation; the order of the three callbacks is that of the data."""
    module = SDSearchModule(
        str(model),
        protocol=PROTOCOL,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=7e-4, weight_decay=0.0),
        max_micro_batch_tokens=8192,
    )
    learn = trainer(
        steps,
        rollouts(),
        HindsightConstruction(groups="mixed"),
        JSDWeightScheduler(weight=0.3, warmup_steps=4),
    )
    learn.fit(module, datamodule=SyntheticWorldDataModule(batch_size=16))
    learn.save_checkpoint(checkpoint)


def rollouts() -> RolloutGrouping:
    """How the policy searches, and what a rollout is worth."""
    return RolloutGrouping(
        group_size=5,
        top_k=2,
        max_searches=4,
        max_turn_tokens=48,
        max_observation_tokens=64,
        max_tokens=512,
        reward=ExactMatchReward(),
    )


def answer(checkpoint: Path) -> list[str | None]:
    """Greedy answers to held-out questions, from the checkpoint: it knows its model, and is told the protocol."""
    module = SDSearchModule.load_from_checkpoint(checkpoint, protocol=PROTOCOL, weights_only=True)
    batches = trainer(0, rollouts()).predict(module, datamodule=SyntheticWorldDataModule(num_val_questions=8))
    for batch in batches or []:
        print(batch)
    return [answer for batch in batches or [] for answer in batch.answers]


def main() -> None:
    """All three, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cold_start_steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path("runs/python_api"))
    options = parser.parse_args()
    L.seed_everything(0)
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    cold_start(options.cold_start_steps, options.output / "cold_start")
    train(options.steps, options.output / "cold_start", options.output / "last.ckpt")
    answer(options.output / "last.ckpt")


if __name__ == "__main__":
    main()
