"""Whose weights a teacher has, after each of the moments at which the module calls it."""

from __future__ import annotations

import math
from typing import Any

import jsonargparse
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.policy.packing import PackedSequences
from sdsearch_lightning.policy.policy import Policy
from sdsearch_lightning.policy.teachers import (
    BatchStartTeacher,
    CopiedTeacher,
    EMATeacher,
    FrozenTeacher,
    LiveTeacher,
    Teacher,
)

COPIED = [BatchStartTeacher, EMATeacher, FrozenTeacher]


def tied_policy(dtype: torch.dtype = torch.float64) -> Policy:
    """Always the same weights; input and output embeddings are one tensor, as in most small models."""
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.3, tie_word_embeddings=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = Policy(LlamaForCausalLM(config).to(dtype))
    assert policy.model.lm_head.weight is policy.model.model.embed_tokens.weight
    return policy


def weights(policy: nn.Module) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in policy.parameters()])


@torch.no_grad()
def move(policy: Policy, seed: int) -> None:
    """What an optimizer step does to it."""
    generator = torch.Generator().manual_seed(seed)
    for weight in policy.parameters():
        weight.add_(torch.randn(weight.shape, dtype=weight.dtype, generator=generator))


def course(teacher: Teacher, policy: Policy, batches: int = 3, updates: int = 2) -> list[tuple[Tensor, Tensor]]:
    """(policy, teacher) weights at each forward pass of the teacher."""
    seen = []
    for batch in range(batches):
        teacher.begin_batch(policy)
        for update in range(updates):
            seen.append((weights(policy), weights(teacher.policy(policy))))
            move(policy, seed=batch * updates + update)
            teacher.after_update(policy)
    return seen


def test_the_live_teacher_is_the_policy() -> None:
    policy, teacher = tied_policy(), LiveTeacher()
    assert teacher.attach(policy) is None, "nothing to register, nothing to save"
    assert teacher.policy(policy) is policy
    assert all(torch.equal(ours, theirs) for ours, theirs in course(teacher, policy))
    assert all(weight.requires_grad for weight in policy.parameters()), "the student still learns"


def test_the_batch_start_teacher_moves_between_batches_only() -> None:
    policy, teacher = tied_policy(), BatchStartTeacher()
    teacher.attach(policy)
    seen = course(teacher, policy)
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(first[1], first[0])
        assert torch.equal(second[1], first[0]) and not torch.equal(second[1], second[0])


def test_the_frozen_teacher_never_moves() -> None:
    policy, teacher = tied_policy(), FrozenTeacher()
    start = weights(policy)
    teacher.attach(policy)
    seen = course(teacher, policy)
    assert all(torch.equal(theirs, start) for _, theirs in seen)
    assert not torch.equal(seen[-1][0], start)


def test_one_step_of_the_average_is_95_percent_old() -> None:
    policy, teacher = tied_policy(), EMATeacher()
    teacher.attach(policy)
    old = weights(policy)
    teacher.begin_batch(policy)
    move(policy, seed=0)
    new = weights(policy)
    assert torch.equal(weights(teacher.copy), old), "it follows after the update"
    teacher.after_update(policy)
    torch.testing.assert_close(weights(teacher.copy), 0.95 * old + 0.05 * new, rtol=0, atol=1e-15)
    assert (weights(teacher.copy) - (0.05 * old + 0.95 * new)).abs().max() > 0.1, "the wrong way round"
    assert torch.equal(weights(policy), new)


@pytest.mark.parametrize("rate", [0.001, 0.05, 0.5, 0.9])
def test_the_average_by_hand(rate: float) -> None:
    policy, teacher = tied_policy(), EMATeacher(rate)
    teacher.attach(policy)
    average = weights(policy).tolist()
    seen = course(teacher, policy)
    for step, (ours, theirs) in enumerate(seen):
        if step > 0:
            average = [(1 - rate) * a + rate * v for a, v in zip(average, ours.tolist(), strict=True)]
        torch.testing.assert_close(theirs, torch.tensor(average, dtype=torch.float64), rtol=0, atol=1e-13)
    assert (seen[-1][1] - seen[-1][0]).abs().max() > 0.1, "it lags behind"


def test_a_tied_weight_moves_once_and_stays_tied() -> None:
    policy, teacher = tied_policy(), EMATeacher(0.5)
    copy = teacher.attach(policy)
    assert copy.model.lm_head.weight is copy.model.model.embed_tokens.weight
    old = policy.model.lm_head.weight.detach().clone()
    move(policy, seed=0)
    teacher.after_update(policy)
    halfway = (old + policy.model.lm_head.weight.detach()) / 2
    torch.testing.assert_close(copy.model.lm_head.weight, halfway, rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", [BatchStartTeacher, EMATeacher])
def test_buffers_are_taken_over(kind: type[CopiedTeacher]) -> None:
    policy, teacher = tied_policy(), kind()
    policy.register_buffer("count", torch.tensor(1))
    teacher.attach(policy)
    policy.get_buffer("count").fill_(7)
    teacher.begin_batch(policy)
    teacher.after_update(policy)
    assert teacher.copy.get_buffer("count").item() == 7


@pytest.mark.parametrize("kind", COPIED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_copy_is_frozen_apart_and_reads_as_the_policy_did(kind: type[CopiedTeacher], dtype: torch.dtype) -> None:
    policy, teacher = tied_policy(dtype).train(), kind()
    policy.model.lm_head.weight.grad = torch.ones_like(policy.model.lm_head.weight)
    copy = teacher.attach(policy)
    assert copy is teacher.policy(policy) is teacher.copy is not policy
    assert policy.training
    assert not any(weight.requires_grad for weight in copy.parameters())
    assert all(weight.grad is None for weight in copy.parameters())
    assert not {w.data_ptr() for w in copy.parameters()} & {w.data_ptr() for w in policy.parameters()}
    assert all(weight.requires_grad for weight in policy.parameters())
    sequences, targets = PackedSequences.pack([[3, 4, 5, 6]]), torch.tensor([1, 2, 3])
    ours, theirs = policy.logits(sequences, targets), copy.logits(sequences, targets)
    assert torch.equal(ours, theirs) and theirs.grad_fn is None
    move(policy, seed=0)
    assert torch.equal(copy.logits(sequences, targets), theirs)
    assert not torch.equal(policy.logits(sequences, targets), ours)


# A run that stops between two batches and goes on


class Host(nn.Module):
    """What the module does with a teacher: registers the copy, and leaves out what is made again."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.policy, self.teacher = tied_policy(), teacher
        self.teacher_policy = teacher.attach(self.policy)

    def train_batches(self, batches: range) -> list[Tensor]:
        seen = []
        for batch in batches:
            self.teacher.begin_batch(self.policy)
            for update in range(2):
                seen.append(weights(self.teacher.policy(self.policy)))
                move(self.policy, seed=batch * 2 + update)
                self.teacher.after_update(self.policy)
        return seen


@pytest.mark.parametrize("kind", [LiveTeacher, *COPIED])
@pytest.mark.parametrize("saved", [True, False])
def test_a_resumed_run_goes_on_exactly(kind: type[Teacher], saved: bool) -> None:
    whole = Host(kind()).train_batches(range(4))
    first, second = Host(kind()), Host(kind())
    first.train_batches(range(2))
    state = {k: v.clone() for k, v in first.state_dict().items() if saved or not k.startswith("teacher_policy.")}
    second.load_state_dict(state, strict=False)
    resumed = second.train_batches(range(2, 4))
    exact = all(torch.equal(a, b) for a, b in zip(resumed, whole[4:], strict=True))
    assert exact == (saved or kind is not EMATeacher)
    assert exact or kind().in_checkpoint, "what is left out of a checkpoint is not missed"
    assert kind().in_checkpoint == (kind in (LiveTeacher, EMATeacher))


# What is refused, and what is accepted


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.05, 1.5, math.nan, math.inf])
def test_a_rate_outside_0_and_1_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match=rf"strictly between 0 and 1, found {rate}"):
        EMATeacher(rate)


class Mine:
    def attach(self, policy):  # type: ignore[no-untyped-def]
        return None

    def begin_batch(self, policy):  # type: ignore[no-untyped-def]
        return None

    after_update = begin_batch

    def policy(self, policy):  # type: ignore[no-untyped-def]
        return policy


def parse(*arguments: str) -> Any:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--teacher", type=Teacher)
    return parser.instantiate(parser.parse_args(arguments)).teacher


def test_a_config_names_the_kind_and_an_unknown_one_is_an_error() -> None:
    made = parse("--teacher=EMATeacher", "--teacher.rate=0.1")
    assert isinstance(made, EMATeacher) and made.rate == 0.1
    for kind in ("LiveTeacher", "BatchStartTeacher", "FrozenTeacher"):
        assert type(parse(f"--teacher={kind}")).__name__ == kind
    assert isinstance(parse(f"--teacher={__name__}.Mine"), Mine)
    for name, *wrong in (["ema"], ["frozen"], ["Sometimes"], ["FrozenTeacher", "rate=0.1"], ["collections.Counter"]):
        with pytest.raises(jsonargparse.ArgumentError):
            parse(f"--teacher={name}", *(f"--teacher.{option}" for option in wrong))


def test_a_look_alike_needs_all_four_methods() -> None:
    assert issubclass(Mine, Teacher)
    assert not issubclass(Policy, Teacher)
