"""One forward for all training compute: packed rows in, the logits that predict them out."""

from __future__ import annotations

import inspect
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from helpers.models import tiny_model
from helpers.tokenizers import EOS, bpe_tokenizer
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.policy.head import Chunk, Reading
from sdsearch_lightning.policy.packing import LAYOUTS, PackedSequences
from sdsearch_lightning.policy.policy import Policy

TOKENIZER = bpe_tokenizer(pad_token=EOS)
PAD = TOKENIZER.pad_token_id
SEQUENCES = [[5, 6, PAD, 7, 0, 8], [9, 1], [PAD, PAD, 3], [0, 0, 0, 0, 0]]


@pytest.fixture(scope="module", params=LAYOUTS)
def policy(request: pytest.FixtureRequest) -> Policy:
    return Policy(tiny_model(tokenizer=TOKENIZER).eval(), request.param)


def keep_both(chunk: Chunk) -> tuple[Tensor, Chunk]:
    return chunk.logits.new_zeros(0), chunk


def reference(model: PreTrainedModel, sequence: list[int]) -> Tensor:
    """[T, V] logits of one sequence alone, as transformers gives them."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([sequence])).logits[0]


def near(actual: Tensor, expected: Tensor) -> bool:
    return actual.shape == expected.shape and bool((actual - expected).abs().max() <= 1e-10)


def test_packing_keeps_every_token_and_counts_positions_from_zero() -> None:
    """Also of pad tokens in the middle: whether a token counts is never read off its id."""
    packed = PackedSequences.pack(SEQUENCES)
    assert packed.token_ids.tolist() == [token for sequence in SEQUENCES for token in sequence]
    assert packed.position_ids.tolist() == [i for sequence in SEQUENCES for i in range(len(sequence))]
    assert packed.sequence_index.tolist() == [i for i, sequence in enumerate(SEQUENCES) for _ in sequence]
    assert (packed.num_sequences, packed.max_length) == (4, 6)
    assert packed.to("cpu").token_ids is packed.token_ids and packed.to("meta").position_ids.is_meta


def test_a_row_predicts_the_token_it_is_asked_for(policy: Policy) -> None:
    packed = PackedSequences.pack(SEQUENCES)
    everything = (packed.position_ids > 0).nonzero()[:, 0]
    with torch.no_grad():
        logits, outcome = policy.logits(packed, everything), policy(packed, [Reading(everything, keep_both)])
    ((chunk,),) = outcome.kept
    expected = torch.cat([reference(policy.model, sequence)[:-1] for sequence in SEQUENCES])
    assert near(logits, expected) and not near(logits, expected.roll(1, 0))
    assert torch.equal(chunk.logits, logits) and chunk.paired is None and chunk.rows == slice(0, len(everything))
    assert near(policy.project(chunk.hidden), expected)
    assert outcome.terms.shape == (0,)


def test_siblings_read_as_each_would_alone(policy: Policy) -> None:
    """The row of a prompt's last token is there once and predicts the first token of each."""
    prompt, suffixes = [5, 6, PAD], [[7, 0, 8], [9], [7, 0, 3, 3]]
    sequences = [*(prompt + suffix for suffix in suffixes), [4, 4, 4], [1, 2]]
    packed = PackedSequences.pack(sequences, prompt_lengths=[3, 3, 3, 1, 1])
    assert packed.shared == (0, 3, 3, 0, 0)
    everything = (packed.position_ids > 0).nonzero()[:, 0]
    with torch.no_grad():
        logits = policy.logits(packed, everything)
    expected = torch.cat([reference(policy.model, sequence)[:-1] for sequence in sequences])
    assert near(logits, expected) and not near(logits, expected.roll(1, 0))
    strangers = torch.cat([reference(policy.model, [6, 6, PAD, *suffix])[:-1] for suffix in suffixes])
    assert not near(logits[: len(strangers)], strangers)


def test_rows_may_come_in_several_tensors_and_any_order(policy: Policy) -> None:
    packed = PackedSequences.pack(SEQUENCES)
    queries, others, nothing = torch.tensor([5, 1]), torch.tensor([10]), torch.tensor([], dtype=torch.long)
    earlier = torch.arange(32.0, dtype=torch.float64).view(2, 16) / 32
    readings = [Reading(queries, keep_both, earlier), Reading(nothing, keep_both), Reading(others, keep_both)]
    with torch.no_grad():
        (first,), (second,), (third,) = policy(packed, readings).kept
    lone = [reference(policy.model, SEQUENCES[0])[[4, 0]], reference(policy.model, SEQUENCES[2])[[1]]]
    assert near(first.logits, lone[0]) and near(third.logits, lone[1])
    assert [tuple(chunk.hidden.shape) for chunk in (first, second, third)] == [(2, 16), (0, 16), (1, 16)]
    assert first.paired is not None and near(first.paired, policy._head(earlier))
    assert not near(first.paired, policy._head(earlier.flip(0)))
    assert second.paired is third.paired is None


def test_gradients_reach_the_weights_from_wanted_rows_only(policy: Policy) -> None:
    packed = PackedSequences.pack(SEQUENCES)
    logits = policy.logits(packed, torch.tensor([7]))  # the second token of the second sequence
    gradient = torch.autograd.grad(logits.sum(), policy.model.get_input_embeddings().weight)[0]
    assert gradient.abs().sum(1).nonzero()[:, 0].tolist() == [9]


def test_decoding_with_holes_is_a_forward_pass(policy: Policy) -> None:
    """Chunks of random widths, some empty, in one cache: each row's logits are those of its own tokens."""
    dice = random.Random(0)
    rows: list[list[int]] = [[], [], []]
    cache, mask = DynamicCache(), torch.zeros(3, 0, dtype=torch.bool)
    for step in range(12):
        chunks = [[dice.randrange(len(TOKENIZER)) for _ in range(dice.randint(step == 0, 4))] for _ in rows]
        width = max(1, *map(len, chunks))
        filled = torch.tensor([len(chunk) for chunk in chunks])
        column = torch.arange(width)
        mask = torch.cat([mask, column < filled[:, None]], 1)
        positions = torch.tensor([len(row) for row in rows])[:, None] + column
        tokens = torch.tensor([chunk + [0] * (width - len(chunk)) for chunk in chunks])
        with torch.no_grad():
            logits = policy.decode(tokens, mask, positions, cache, (filled - 1).clamp(min=0))
        for row, chunk, predicted in zip(rows, chunks, logits, strict=True):
            row += chunk
            if chunk:
                assert near(predicted, reference(policy.model, row)[-1])
                assert not near(predicted, reference(policy.model, row[:-1] + [(row[-1] + 1) % 5])[-1])


def test_softcapped_models_keep_their_cap(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = policy._head(torch.ones(1, 16).double())
    monkeypatch.setattr(policy.model.config, "final_logit_softcapping", 0.5, raising=False)
    capped = policy._head(torch.ones(1, 16).double())
    assert near(capped, 0.5 * torch.tanh(plain / 0.5)) and not near(capped, plain)


def test_under_autocast_the_output_layer_keeps_the_precision_of_its_weights() -> None:
    """Logits of 16 to 32 are rounded to an eighth in bfloat16: .03 nats on a pretrained model."""
    model, generator = tiny_model("llama", torch.float32), torch.Generator().manual_seed(0)
    hidden = 30 * torch.randn(3, 16, generator=generator)
    exact = Policy(model).project(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        wide, narrow = Policy(model).project(hidden), Policy(model, wide_head=False).project(hidden)
    assert torch.equal(wide, exact) and narrow.dtype == torch.bfloat16 and not torch.equal(narrow.float(), exact)
    half = tiny_model("llama", torch.bfloat16)
    assert Policy(half).project(hidden.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("weights", "kept"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_what_is_kept_is_float32_or_float64(weights: torch.dtype, kept: torch.dtype) -> None:
    assert Policy(tiny_model("llama", weights)).dtype == kept


def test_a_family_whose_head_is_another_is_refused() -> None:
    Policy(tiny_model("llama")).check(torch.device("cpu"))
    for family, options in (("granite", {"logits_scaling": 8.0}), ("cohere", {"logit_scale": 0.1})):
        Policy(tiny_model(family, **options)).check(torch.device("cpu"))
    other = tiny_model("llama")
    forward = other.forward

    def doubled(*args: Any, **options: Any) -> Any:
        output = forward(*args, **options)
        output.logits = 2 * output.logits
        return output

    other.forward = doubled
    with pytest.raises(ConfigError, match=r"Models of type 'llama' scale or shift their logits"):
        Policy(other).check(torch.device("cpu"))


def test_every_entrance_takes_an_argument() -> None:
    """On CUDA, FSDP2 fails at a call without any."""
    for name in Policy.ENTRANCES:
        _, *arguments = inspect.signature(getattr(Policy, name)).parameters.values()
        assert any(argument.default is inspect.Parameter.empty for argument in arguments), name
