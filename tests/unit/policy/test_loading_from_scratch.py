"""Models made of nothing: from their seed alone, and which ones cannot be made."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.training_rollouts import TRAINING_PROTOCOL, TRAINING_TOKENIZER
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.policy import loading as models
from sdsearch_lightning.policy.loading import ScratchModel


def scratch(seed: int = 0, **options: Any) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return models.from_scratch(ScratchModel("llama", sizes | options), TRAINING_TOKENIZER, torch.float32, seed)


def test_a_new_model_depends_on_its_seed_alone() -> None:
    torch.manual_seed(7)
    first, drawn = scratch(), torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(1), drawn), "making a model draws no random number of the run"
    second, other = scratch(), scratch(seed=1)
    pairs = list(zip(first.parameters(), second.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)
    assert (
        first.config.vocab_size == len(TRAINING_TOKENIZER)
        and first.config.eos_token_id == TRAINING_TOKENIZER.eos_token_id
    )
    assert first.get_input_embeddings().weight.std().item() == pytest.approx(16**-0.5, rel=0.1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (ScratchModel("qwen2"), "model_type 'qwen2': transformers ties this type to Qwen2.*Use llama"),
        (ScratchModel("lama"), "model.scratch: .*lama"),
        (ScratchModel("llama", {"hiden_size": 16}), "model.scratch.options: 'llama' has no option hiden_size"),
    ],
)
def test_a_model_that_cannot_be_made_or_loaded_again_is_refused(spec: ScratchModel, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        models.from_scratch(spec, TRAINING_TOKENIZER, torch.float32, 0)


def test_every_tag_is_one_word_of_the_vocabulary() -> None:
    tokenizer = models.word_level_tokenizer(["a", "b", "a"], TRAINING_PROTOCOL.tags)
    assert len(tokenizer) == 3 + len(TRAINING_PROTOCOL.tags) + 2
    assert tokenizer.encode("a </search> zebra") == [
        len(tokenizer) - 2,
        3 + TRAINING_PROTOCOL.tags.index("</search>"),
        0,
    ]
