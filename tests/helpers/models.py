"""Models of a few thousand weights, and a policy that searches and answers by chance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from helpers.tokenizers import WORDS
from helpers.training_rollouts import TRAINING_TOKENIZER
from sdsearch_lightning.policy.policy import Policy
from sdsearch_lightning.protocol.tokenization import TokenCodec


def tiny_model(
    family: str = "llama",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase = TRAINING_TOKENIZER,
    **options: Any,
) -> Any:
    """A random causal LM whose distributions are far from uniform.

    Args:
        family: as transformers names it.
        dtype: of its weights.
        seed: of its weights.
        tokenizer: it has a row per token of it.
        options: others of its config.
    """
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "max_position_embeddings": 256, "initializer_range": 0.3}
    if family == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256, "initializer_range": 0.3}
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **sizes | special | options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


class TalkativePolicy(Policy):
    """`tiny_model` over whole words, with a constant leaning towards the tags: it searches and answers by chance."""

    def __init__(self, codec: TokenCodec, seed: int = 0, **options: Any) -> None:
        sizes = {"intermediate_size": 24, "max_position_embeddings": 2048} | options
        super().__init__(tiny_model("llama", torch.float32, seed, codec.tokenizer, **sizes).double().eval())
        leaning = {"<search>": 1.5, "</search>": 2.5, "<answer>": 0.0, "</answer>": 0.5, "<eos>": 0.0}
        bias = torch.full((len(codec.tokenizer),), -1.0, dtype=torch.float64)
        bias[[codec.encode(word)[0] for word in WORDS]] = 0.0
        for text, value in leaning.items():
            bias[codec.encode(text)[0]] = value
        self.register_buffer("bias", bias)

    def _head(self, rows: Tensor) -> Tensor:
        return super()._head(rows) + self.bias
