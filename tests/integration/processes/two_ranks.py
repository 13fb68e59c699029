"""One short fit on the CPU with SD on, on as many processes as asked for; rank 0 writes losses and weights.

    python two_ranks.py STRATEGY VARIANT OUTPUT [CHECKPOINT]

STRATEGY is one (a single process), ddp or fsdp2 (two); VARIANT a key of VARIANTS. A checkpoint of step 1 is saved next
to the output; with CHECKPOINT the run goes on from there.

Questions at odd positions are answered without a search. With two processes they are all on rank 1, whose share of a
step then has not one query token.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[3]), str(Path(__file__).parents[2])]
warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

import lightning.pytorch as pl  # noqa: E402
import torch  # noqa: E402

from helpers.fits import DrawnScripts, Record, ToyData, fit  # noqa: E402
from helpers.models import tiny_model  # noqa: E402
from helpers.players import ScriptedEngine  # noqa: E402
from helpers.training import make_module  # noqa: E402
from helpers.training_rollouts import DIRECT, TRAINING_PROTOCOL, TRAINING_TOKENIZER  # noqa: E402
from sdsearch_lightning import SDSearchModule  # noqa: E402
from sdsearch_lightning.__main__ import end_process  # noqa: E402
from sdsearch_lightning.callbacks import (  # noqa: E402
    CreditDiagnostics,
    CreditWeightScheduler,
    HindsightConstruction,
    JSDWeightScheduler,
    RolloutGrouping,
    TeacherDiagnostics,
)
from sdsearch_lightning.checkpoints.shards import AnyCheckpointIO  # noqa: E402
from sdsearch_lightning.hindsight import ContrastedSiblings  # noqa: E402
from sdsearch_lightning.losses import RLCSD, RLSD  # noqa: E402
from sdsearch_lightning.policy import loading  # noqa: E402
from sdsearch_lightning.policy.lora import LoRA  # noqa: E402
from sdsearch_lightning.policy.teachers import BatchStartTeacher, EMATeacher  # noqa: E402
from sdsearch_lightning.scoring.policy_credit import SelfJudgement  # noqa: E402
from sdsearch_lightning.scoring.rewards import ExactMatchReward  # noqa: E402
from sdsearch_lightning.training.options import Compute  # noqa: E402

KEYS = (
    *("train/loss", "train/policy_loss", "train/kl", "distill/loss", "distill/jsd"),
    *("distill/abs_log_ratio", "distill/changed_advantages", "distill/teacher_rows"),
)


def silent_at_odd_positions() -> ScriptedEngine:
    """Searches at even positions only."""
    searching = DrawnScripts()
    return ScriptedEngine(lambda r: DIRECT if r.instance_id[1] % 2 else searching.script(r), logprobs=None)


VARIANTS: dict[str, dict] = {
    "plain": {},
    "all": {
        "tie_word_embeddings": True,
        "teacher": EMATeacher(0.3),
        "num_updates": 3,
        "compute": Compute(gradient_checkpointing=True),
    },
    "lora": {"lora": LoRA(r=4), "teacher": EMATeacher(0.3), "num_updates": 3},
    "credit": {"query_credit": SelfJudgement((" the", " Rome"), (" none",), "<think>"), "num_updates": 3},
    "going_on": {"lora": LoRA(adapter="adapter"), "compute": Compute(gradient_checkpointing=True)},
    "rlsd": {"teacher_use": RLSD(), "num_updates": 3},
    "contrast": {"teacher_use": RLCSD(), "block": ContrastedSiblings(), "num_updates": 3},
    "batch_start": {
        "teacher": BatchStartTeacher(),
        "num_updates": 3,
        "compute": Compute("padded"),
        "diagnostics": True,
    },
}


class SaveFirstStep(pl.Callback):
    """Saves the first step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == 1:
            trainer.save_checkpoint(self.path, weights_only=False)


def make_learned_adapter(model: torch.nn.Module) -> SDSearchModule:
    """A module with an adapter that says something."""
    module = make_module(model, lora=LoRA(r=3))
    with torch.no_grad():
        for name, weight in module.policy.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.1 * torch.sin(torch.arange(weight.numel()).view_as(weight)))
    return module


def main(strategy: str, variant: str, output: str, checkpoint: str | None = None) -> None:
    torch.set_num_threads(1)
    options = dict(VARIANTS[variant])
    tied = options.pop("tie_word_embeddings", False)
    diagnostics, block = options.pop("diagnostics", False), options.pop("block", None)
    credit = options.pop("query_credit", None)
    folder = Path(output).with_suffix(".model")
    if "LOCAL_RANK" not in os.environ:
        tiny_model(tie_word_embeddings=tied).save_pretrained(folder)
        TRAINING_TOKENIZER.save_pretrained(folder)
        if variant == "going_on":
            make_learned_adapter(tiny_model()).save_adapter("adapter")
    elif strategy == "fsdp2":
        loading.load = None  # rank 0 alone reads weights
    module = SDSearchModule(
        model_name_or_path=str(folder),
        dtype="float64",
        protocol=TRAINING_PROTOCOL,
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.01),
        kl_coef=0.1,
        max_micro_batch_tokens=200,  # several micro-batches, and not equally many on both ranks
        **options,
    )
    record = Record()
    grouping = RolloutGrouping(
        group_size=3,
        top_k=2,
        max_tokens=160,
        reward=ExactMatchReward(),
        credit=credit,
        engine=silent_at_odd_positions(),
    )
    blocks = HindsightConstruction(block=block)
    method = blocks, JSDWeightScheduler(0.3, 0), CreditWeightScheduler(0.7), CreditDiagnostics()
    devices = 1 if strategy == "one" else 2
    distributed = {"strategy": strategy, "devices": 2} if devices == 2 else {}
    if strategy != "fsdp2":
        distributed["plugins"] = [AnyCheckpointIO()]
    data = ToyData(batch_size=6 // devices)
    if diagnostics:
        method = *method, TeacherDiagnostics(1, gradient_norms=False)
    callbacks = (grouping, *method, record, SaveFirstStep(Path(output).with_suffix(".ckpt")))
    trainer = fit(module, *callbacks, data=data, max_steps=2, ckpt_path=checkpoint, **distributed)
    searches = sum(len(t.queries) for batch in record.batches for g in batch.groups for t in g.trajectories)
    assert trainer.global_rank == 0 or searches == 0, "rank 1 has no query token"
    rollouts = [t for batch in record.batches for g in batch.groups for t in g.trajectories]
    advantages = {a for t in rollouts for a in t.query_advantages or ()}
    assert len(advantages) != 1 and bool(advantages) == (credit is not None and searches > 0), "queries differ"
    weights = module.whole_weights()
    if trainer.is_global_zero:
        steps = [[metrics[key] for key in KEYS] for metrics in record.metrics]
        flat = torch.cat([weights[name].flatten() for name in sorted(weights)])
        Path(output).write_text(json.dumps({"steps": steps, "weights": flat.tolist()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
    end_process(0)
