"""Float32 masters: small updates add up, states come back, and without them they would be lost."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sdsearch_lightning.training.master_weights import MasterWeights

LR, STEPS = 1e-6, 300


def make(dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Parameter, MasterWeights, torch.optim.Optimizer]:
    weight = nn.Parameter(torch.full((4,), 0.02).to(dtype))
    masters = MasterWeights([weight])
    return weight, masters, masters.optimizer(lambda weights: torch.optim.AdamW(weights, lr=LR, weight_decay=0.0))


def step(weight: nn.Parameter, masters: MasterWeights, optimizer: torch.optim.Optimizer, times: int = STEPS) -> None:
    for _ in range(times):
        weight.grad = torch.ones_like(weight)
        masters.take_gradients()
        optimizer.step()
        optimizer.zero_grad()


def test_updates_below_the_weights_resolution_add_up() -> None:
    weight, masters, optimizer = make()
    start = weight.detach().clone()
    step(weight, masters, optimizer, 1)
    assert torch.equal(weight, start) and not torch.equal(masters.masters[0], start.float())
    step(weight, masters, optimizer, STEPS - 1)
    expected = start.float() - LR * STEPS
    torch.testing.assert_close(masters.masters[0].detach(), expected, rtol=0, atol=LR)
    assert torch.equal(weight, masters.masters[0].bfloat16()) and not torch.equal(weight, start)


def test_without_masters_they_are_lost() -> None:
    weight = nn.Parameter(torch.full((4,), 0.02).bfloat16())
    optimizer = torch.optim.AdamW([weight], lr=LR, weight_decay=0.0)
    for _ in range(STEPS):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert torch.equal(weight, torch.full((4,), 0.02).bfloat16())


def test_a_restored_optimizer_goes_on_exactly() -> None:
    weight, masters, optimizer = make()
    step(weight, masters, optimizer, 7)
    state, kept = optimizer.state_dict(), weight.detach().clone()
    state = {name: value for name, value in state.items()}
    master = masters.masters[0].detach().clone()
    step(weight, masters, optimizer, 5)
    other, other_masters, other_optimizer = make()
    with torch.no_grad():
        other.copy_(kept)
    other_optimizer.load_state_dict({**state, "master_weights": [master]})
    assert torch.equal(other_masters.masters[0], master) and not torch.equal(master, kept.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_weights_are_their_own_masters(dtype: torch.dtype) -> None:
    weight, masters, optimizer = make(dtype)
    assert masters.masters[0] is weight and "master_weights" not in optimizer.state_dict()
    step(weight, masters, optimizer, 3)
    assert not torch.equal(weight, torch.full((4,), 0.02).to(dtype))
