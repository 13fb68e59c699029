"""Compiled layers give the same losses, gradients and rollouts; here they are traced, and run as they are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from helpers.models import TalkativePolicy, tiny_model
from helpers.slots import TALK_LIMITS, essences, run_engine, talk_requests
from helpers.training import drifted, gradient, step, taught_batch
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.losses.divergences import JensenShannon
from sdsearch_lightning.losses.terms import total_loss
from sdsearch_lightning.policy.compiling import compile_layers
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.rollout import SlotEngine
from sdsearch_lightning.training import policy_module
from sdsearch_lightning.training.options import Compute

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch's tracer asks


@pytest.fixture(autouse=True)
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounter]:
    """In place of a compiler: counts graphs, and runs them operation by operation."""
    counter = CompileCounter()
    monkeypatch.setattr(policy_module, "compile_layers", lambda decoder: compile_layers(decoder, counter))
    torch._dynamo.reset()
    yield counter
    torch._dynamo.reset()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_are_the_same(checkpointing: bool, counter: CompileCounter) -> None:
    pulls: list[Tensor] = []
    for compiled in (False, True):
        compute = Compute(gradient_checkpointing=checkpointing, compile_layers=compiled)
        module = drifted(tiny_model("llama"), divergence=JensenShannon(top_k=9), compute=compute)
        for _ in range(2):
            sums = step(module, taught_batch(module))
            loss = total_loss(sums.terms, module.policy_terms.coefficients(1.0))
            pulls.append(gradient(module, loss))
        assert (counter.frame_count > 0) == compiled
    for pull in pulls[1:]:
        torch.testing.assert_close(pull, pulls[0], rtol=0, atol=1e-12)
    assert pulls[0].abs().max() > 1e-3 and not torch.allclose(pulls[2] * (1 + 1e-6), pulls[0], rtol=0, atol=1e-12)


def test_rollouts_are_the_same_and_few_graphs_serve_them(word_codec: TokenCodec, counter: CompileCounter) -> None:
    policy, requests = TalkativePolicy(word_codec, seed=1), talk_requests(word_codec, 3)
    expected = run_engine(SlotEngine(), policy, word_codec, requests, TALK_LIMITS)
    compile_layers(policy.model.get_decoder(), counter)
    found = run_engine(SlotEngine(), policy, word_codec, requests, TALK_LIMITS)
    assert essences(found) == essences(expected)
    assert 0 < counter.frame_count <= 12, "whatever the number of rows and tokens"


def test_a_body_without_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="compile_layers: expected a model with a list of `layers`, found GPT2Model"):
        compile_layers(tiny_model("gpt2").get_decoder())
