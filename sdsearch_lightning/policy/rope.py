"""Rotary frequencies that must not follow the tokens of a pass.

With longrope (Phi-3.5, Phi-4-mini) a model has two sets of frequencies, and transformers takes the long one for a
whole pass as soon as one position in it is beyond the original context. Neighbours in a micro-batch would then change a
loss, a rollout would change its past as it grows, and the teacher, whose block makes it longer, would be another model
than the student. So one set is fixed for the run, as servers do that know their longest context.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def fix_frequencies(model: PreTrainedModel, long_context: bool) -> int | None:
    """Fix the rotary frequencies of a longrope model, in place.

    Args:
        model: any model; others are left alone.
        long_context: the set for positions beyond the original context, instead of the one for positions within it.

    Returns:
        Tokens that a sequence may have under the short set; None where there is no such bound.
    """
    parts = [part for part in model.modules() if getattr(part, "rope_type", None) == "longrope"]
    for part in parts:
        _fix(part, long_context)
    if not parts or long_context:
        return None
    return int(parts[0].config.rope_parameters["original_max_position_embeddings"])


def _fix(part: nn.Module, long_context: bool) -> None:
    rotary: Any = part
    if long_context:
        beyond = rotary.config.rope_parameters["original_max_position_embeddings"] + 1
        frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](rotary.config, rotary.inv_freq.device, seq_len=beyond)
    else:
        frequencies = rotary.original_inv_freq
    rotary.inv_freq.copy_(frequencies)
    rotary.rope_type = "default"  # nothing is updated any more
