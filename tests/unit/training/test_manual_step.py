"""How far an update goes: of all numbers where there are few, of an even sample where there are many."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from helpers.fits import DrawnScripts, Record, fit
from helpers.models import tiny_model
from helpers.training_rollouts import TRAINING_PROTOCOL, TRAINING_TOKENIZER
from sdsearch_lightning import SDSearchModule
from sdsearch_lightning.callbacks import HindsightConstruction, JSDWeightScheduler, RolloutGrouping
from sdsearch_lightning.policy.loading import ScratchModel
from sdsearch_lightning.training.manual_step import SAMPLE, ManualStep, _sample

ALONE = SimpleNamespace(policy=SimpleNamespace(is_sharded=False))


def test_a_sample_is_even_and_small() -> None:
    few, many = torch.arange(6.0).view(2, 3), torch.arange(10_000.0)
    assert _sample([few]).tolist() == [0, 1, 2, 3, 4, 5]
    drawn = _sample([many])
    assert len(drawn) == SAMPLE and drawn[1] - drawn[0] == 39 and drawn[-1] == 39 * (SAMPLE - 1)


def test_the_ratio_is_of_lengths() -> None:
    before, after = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    assert ManualStep._ratio(ALONE, before, after) == pytest.approx(0.1)  # type: ignore[arg-type]
    assert ManualStep._ratio(ALONE, before, before) == 0.0  # type: ignore[arg-type]


@pytest.mark.parametrize("lr", [1e-3, 1e-1])
def test_a_step_logs_how_far_its_update_went(lr: float) -> None:
    module = SDSearchModule(
        scratch=ScratchModel(),
        protocol=TRAINING_PROTOCOL,
        optimizer=lambda params: torch.optim.SGD(params, lr=lr),
        gradient_clip_val=None,
    )
    module.attach(tiny_model(), TRAINING_TOKENIZER)
    size = torch.stack([w.detach().norm() for w in module.policy.parameters()]).norm()
    record = Record()
    grouping = RolloutGrouping(group_size=3, top_k=2, max_tokens=160, engine=DrawnScripts())
    fit(module, grouping, HindsightConstruction(), JSDWeightScheduler(0.3, 0), record)
    (metrics,) = record.metrics
    # The toy's weights are a little larger than a sample: a tenth is far between right and wrong.
    expected = lr * metrics["train/grad_norm"] / float(size)
    assert metrics["train/grad_norm"] > 0 and metrics["train/update_ratio"] == pytest.approx(expected, rel=0.3)
    assert metrics["train/update_ratio"] != pytest.approx(2 * expected, rel=0.3)
