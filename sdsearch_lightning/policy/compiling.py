"""torch.compile of the parts of layers that are the same in every pass."""

from __future__ import annotations

from torch import nn

from sdsearch_lightning.errors import ConfigError


def compile_layers(decoder: nn.Module, backend: str = "inductor") -> None:
    """Compile the norms and the feed-forward part of each layer, for any number of tokens.

    Attention stays as it is, since a layout does something else in each pass; so does the layer around it, which
    gradient checkpointing and FSDP2 wrap.

    Args:
        decoder: body of a transformers model.
        backend: of torch.compile.

    Raises:
        ConfigError: the body keeps its layers where most models of transformers do not.
    """
    layers = getattr(decoder, "layers", None)
    if layers is None:
        raise ConfigError(
            f"model.compute.compile_layers: expected a model with a list of `layers`, found {type(decoder).__name__}. "
            "Set it to false."
        )
    for part in (part for layer in layers for part in layer.children()):
        if not hasattr(part, "layer_idx"):  # attention, and what remembers as it does, knows its layer
            part.compile(backend=backend, dynamic=True)
