"""The policy: a Hugging Face causal LM whose every training computation goes through one `forward`.

`forward` holds body, row gather and head, so that DDP and FSDP2 can wrap it as one module and nobody calls an inner
module of a wrapped root. This is also the one place that shifts: the row read for token t is the one that predicts it,
that of the token before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.losses.logprobs import wide_dtype
from sdsearch_lightning.policy.attention import (
    AttentionLayout,
    Call,
    CausalSegments,
    Segment,
    UnknownAttentionError,
    attention_layout,
    implementation,
)
from sdsearch_lightning.policy.head import Head, Outcome, Reading, keep_logits, read_rows
from sdsearch_lightning.policy.packing import LAYOUTS, LayoutName, Packed, PackedSequences, Padded
from sdsearch_lightning.policy.rope import fix_frequencies

if TYPE_CHECKING:
    from transformers import PreTrainedModel


MAX_WINDOW = 4096
"""Larger windows are not tried: two passes over so many tokens would take too long."""


class Policy(nn.Module):
    """Body, row gather and head of one causal LM behind one `forward`.

    Args:
        model: any Hugging Face causal LM with rotary or learned positions and a linear output layer.
        layout: how the body runs over sequences, see packing.py; a model that cannot pack is padded.
        long_context: for models with two sets of rotary frequencies, see rope.py.
        wide_head: compute the output layer in the precision of its weights where autocast has a lower one.
    """

    ENTRANCES = ("advance", "decode", "project", "check", "find_obstacle")
    """What else runs the model, beside `forward`: where weights are sharded, they are gathered for these too.

    Each takes an argument: FSDP2 moves arguments to the device, and on CUDA it fails where there are none."""

    def __init__(
        self,
        model: PreTrainedModel,
        layout: LayoutName = "shared_prefix",
        long_context: bool = False,
        wide_head: bool = True,
    ) -> None:
        super().__init__()
        self.model, self._wide_head = model, wide_head
        self._layout: LayoutName = layout
        self._short_context = fix_frequencies(model, long_context)
        if getattr(model.config, "attn_logit_softcapping", None) is not None:
            model.set_attn_implementation("eager")  # of transformers' own, it alone caps the logits of attention

    @property
    def dtype(self) -> torch.dtype:
        """What weights, log-probs and advantages of a batch are kept in: float32, or float64 where the weights are."""
        return wide_dtype(self.model.dtype)

    @property
    def is_sharded(self) -> bool:
        """Whether every forward pass is a collective (FSDP2)."""
        return isinstance(self, FSDPModule)

    @property
    def layout(self) -> Padded | Packed:
        """How the body runs over sequences."""
        return LAYOUTS["padded" if self.unpackable else self._layout]

    @property
    def max_context(self) -> int | None:
        """Tokens that the model was made to read at most; None where it does not say."""
        if self._short_context is not None:
            return self._short_context
        config = self.model.config
        rope = getattr(config, "rope_parameters", None) or {}
        stretch = rope.get("factor", 1.0) if rope.get("rope_type") == "yarn" else 1.0
        length = getattr(config, "max_position_embeddings", None)
        return None if length is None else int(length * max(stretch, 1.0))

    def forward(
        self, sequences: PackedSequences, readings: Sequence[Reading], mixture: Sequence[float] | None = None
    ) -> Outcome:
        """Run the body over sequences, and let readings have the rows that predict their targets.

        Args:
            sequences: the tokens; causal attention within each sequence.
            readings: which rows, and what to make of them; see head.py.
            mixture: coefficients of the loss terms, see `head.read_rows`.
        """
        if self.max_context is not None and sequences.max_length > self.max_context:
            raise ConfigError(
                f"A sequence of {sequences.max_length} tokens is longer than the {self.max_context} that the model "
                "reads. Lower rollout.max_tokens, or hindsight.max_block_tokens where the block makes it so long."
            )
        arranged = self.layout.arrange(sequences)
        states = self._body(arranged.token_ids, arranged.position_ids, arranged.attention)
        rows = [states[arranged.place[reading.targets - 1]] for reading in readings]
        return read_rows(self._output(), rows, readings, mixture)

    def logits(self, sequences: PackedSequences, targets: Tensor) -> Tensor:
        """[R, V] logits that predict the target tokens, for few of them; see `Reading.targets`."""
        outcome: Outcome = self(sequences, [Reading(targets, keep_logits)])
        return torch.cat(outcome.kept[0])

    def _body(self, token_ids: Tensor, position_ids: Tensor | None, attention: AttentionLayout | None) -> Tensor:
        """[B * X, H] hidden states of [B, X] tokens."""
        with attention_layout(self.model, attention) as options:
            states: Tensor = self.model.get_decoder()(
                input_ids=token_ids, position_ids=position_ids, use_cache=False, **options
            ).last_hidden_state
        return states.flatten(0, 1)

    def _output(self) -> Head:
        layer = self.model.get_output_embeddings()
        weights = tuple(weight for weight in layer.parameters() if weight.requires_grad)
        return Head(self._head, weights, layer.weight.shape[0])

    def _head(self, rows: Tensor) -> Tensor:
        layer, device = self.model.get_output_embeddings(), rows.device.type
        with torch.autocast(device, enabled=torch.is_autocast_enabled(device) and not self._wide_head):
            logits: Tensor = layer(rows.to(layer.weight.dtype))
        config = self.model.config
        if (factor := getattr(config, "logit_scale", None)) is not None:  # Cohere
            logits = logits * factor
        if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
            logits = logits / divisor
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
            logits = cap * torch.tanh(logits / cap)
        return logits

    def project(self, hidden: Tensor) -> Tensor:
        """[Q, V] logits of hidden rows [Q, H] of an earlier call; for copies, which nobody trains."""
        return self._head(hidden)

    def reshard(self) -> None:
        """Give up gathered weights, where they are sharded; a copy would keep those of its head from call to call."""
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    # Rollouts, outside of any wrapper

    def advance(self, token_ids: Tensor, position_ids: Tensor, attention: AttentionLayout, last: Tensor) -> Tensor:
        """[R, V] logits after feeding tokens to rows that `attention` keeps.

        Args:
            token_ids: [T] new tokens, those of one row after those of another.
            position_ids: [T] of each within its row.
            attention: where their keys and values go, and what they attend to.
            last: [R] which of the T tokens to continue.
        """
        return self._head(self._body(token_ids[None], position_ids[None], attention)[last])

    def decode(
        self, token_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Any, last: Tensor
    ) -> Tensor:
        """[A, V] logits after feeding a chunk to a transformers KV cache: what the reference engine runs on.

        Args:
            token_ids: [A, W] new tokens, right-padded.
            attention_mask: [A, L + W] bool over cached and new cells; False cells are holes.
            position_ids: [A, W].
            cache: a transformers Cache, extended in place.
            last: [A] column of each row's last real token in the chunk.
        """
        states = self.model.get_decoder()(
            input_ids=token_ids,
            attention_mask=attention_mask.long(),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return self._head(states[torch.arange(len(last), device=last.device), last])

    # What the model can do

    @torch.no_grad()
    def check(self, device: torch.device) -> None:
        """Compare with the model's own logits on four tokens: some families do more in their head than is done here.

        Args:
            device: of the weights.

        Raises:
            ConfigError: the logits differ, or the model is not made of a body and an output layer.
        """
        tokens, name = self._any_tokens(4, device), self.model.config.model_type
        with self._without_dropout():
            try:
                theirs = self.model(input_ids=tokens, use_cache=False).logits[0]
                mine = self._head(self._body(tokens, None, None))
            except (TypeError, AttributeError, RuntimeError) as error:
                raise ConfigError(f"Models of type {name!r} cannot be trained here: {error}.") from error
        if not torch.allclose(mine, theirs, rtol=1e-2, atol=1e-2 * float(theirs.abs().max())):
            raise ConfigError(
                f"Models of type {name!r} scale or shift their logits in a way that is not "
                "known here: training would use other probabilities than the model's. Use another family."
            )

    @cached_property
    def unpackable(self) -> str | None:
        """Why the model's sequences cannot lie back to back; None where they can."""
        return self.find_obstacle(self.model.device)

    @torch.no_grad()
    def find_obstacle(self, device: torch.device) -> str | None:
        """What `unpackable` remembers, by trying: sequences packed have to give what each gives alone.

        The second is a suffix of the first one's beginning, as siblings are; both reach beyond the model's window.
        """
        name, shared = self.model.config.model_type, 3
        longest = (self.window_to_try or 0) + 8
        tokens, rest = self._any_tokens(longest, device), self._any_tokens(longest + 7, device)[:, 7 + shared :]
        witness = _Witness([Segment(shared), Segment(longest - shared, 0), Segment(rest.shape[1], 0)])
        positions = torch.arange(longest, device=tokens.device)
        with self._without_dropout():
            try:
                packed = self._body(
                    torch.cat([tokens, rest], dim=1), torch.cat([positions, positions[shared:]])[None], witness
                )
            # What a model's own code raises where it counts on a mask of its own, as Falcon's does.
            except (UnknownAttentionError, TypeError, AttributeError, RuntimeError) as error:
                return f"models of type {name} cannot: {str(error).splitlines()[0]}"
            sibling = torch.cat([tokens[:, :shared], rest], dim=1)
            alone = torch.cat([self._body(tokens, None, None), self._body(sibling, None, None)[shared:]])
        tolerance = (1e-4 if alone.dtype in (torch.float32, torch.float64) else 5e-2) * float(alone.abs().max())
        if witness.layers != self.model.config.num_hidden_layers or not torch.allclose(packed, alone, 0, tolerance):
            return f"models of type {name} cannot: a layer does more across tokens than attend"
        return None

    @property
    def window_to_try(self) -> int | None:
        """The model's window, where it has one that is small enough to be tried; None where it has not."""
        windows = (getattr(self.model.config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        return max([window for window in windows if window and window <= MAX_WINDOW], default=None)

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training

    def _any_tokens(self, number: int, device: torch.device) -> Tensor:
        return torch.tensor([[(7 * i) % self.model.config.vocab_size for i in range(number)]], device=device)

    def checkpoint_gradients(self) -> None:
        """Keep only the layers' inputs in training, and compute the rest again in the backward pass."""

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            # By the backward pass the model has its own attention function back; what is computed again needs this one.
            return nullcontext(), implementation(self.model, self.model.config._attn_implementation)

        # transformers 5.23 renamed it, and warns of the name that 5.17 knows alone.
        enable = getattr(self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable)
        enable({"use_reentrant": False, "context_fn": contexts})


class _Witness(CausalSegments):
    """Counts the layers that ask."""

    layers = 0

    def attend(self, call: Call) -> Tensor:
        self.layers += 1
        return super().attend(call)
