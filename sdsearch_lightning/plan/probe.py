"""What a model's weights and passes take, found by running one and two of its layers on tensors without memory.

No formula of any architecture stands here: the real `Policy`, its layout and its attention run on fake tensors, whose
sizes are those of the run, and the bytes that stay alive are counted. What one layer keeps is the difference of two
layers and one. A frozen model with adapters is probed as such.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.plan.live_bytes import LiveBytes
from sdsearch_lightning.plan.memory import ModelCounts, OptimizerBytes, PassBytes
from sdsearch_lightning.policy.attention import CausalSegments, Segment, attention_layout
from sdsearch_lightning.policy.packing import LAYOUTS, Arrangement, LayoutName, PackedSequences
from sdsearch_lightning.policy.policy import Policy
from sdsearch_lightning.rollout.kv_rows import KVShape
from sdsearch_lightning.training.master_weights import MasterWeights

SHARED_PROMPT = 256
"""Assumed: tokens of the prompt that siblings share; it decides little."""

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
MakeModel = Callable[[torch.dtype], Any]
"""Makes the causal LM of its configuration, with weights of that type, on whatever device is the default."""


@dataclass(frozen=True, slots=True)
class Adapters:
    """LoRA: two small matrices beside each adapted layer, the model itself frozen."""

    rank: int
    targets: Sequence[str] | None
    """Last parts of module names; None = every linear layer but the output layer."""
    dtype: torch.dtype = torch.float32
    """Theirs; the frozen weights may have another."""


@dataclass(frozen=True, slots=True)
class Precision:
    """In which dtypes the passes of a run keep and multiply numbers."""

    weights: torch.dtype
    """As the passes see them: under fsdp2 those that are gathered."""
    autocast: torch.dtype | None
    """In which products are computed instead; None = in that of the weights."""

    @property
    def compute(self) -> torch.dtype:
        """The dtype in which matrix products are taken: the half precision, where there is one."""
        return self.autocast or self.weights


@dataclass(frozen=True, slots=True)
class Shape:
    """How large the largest passes of a run are, in tokens."""

    layout: LayoutName
    rollout: int
    """Tokens of the longest rollout that is allowed."""
    group_size: int
    """G."""
    micro_batch: int
    """model.max_micro_batch_tokens; a group is never split, so one may be larger."""
    reading: int
    """Tokens that a rollout pass reads."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of the sequences of the largest micro-batch, all as long as they may get."""
        group = [self.rollout] * self.group_size
        whole, rest = divmod(max(self.micro_batch, sum(group)), self.rollout)
        return [self.rollout] * whole + ([rest] if rest > 1 else [])


class _Adapted(nn.Module):
    """A linear layer with adapters, computed as peft does."""

    def __init__(self, base: nn.Linear, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, dtype=dtype)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        dtype, x = result.dtype, x.to(self.lora_A.weight.dtype)
        result = result + self.lora_B(self.lora_A(x)) * 1.0
        return result.to(dtype)


def adapt(model: Any, adapters: Adapters | None) -> Any:
    """The model with adapters in place; without `adapters`, as it is.

    Raises:
        ConfigError: none of the targets is a linear layer of the model.
    """
    if adapters is None:
        return model
    model.requires_grad_(False)
    output, found = model.get_output_embeddings(), 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            wanted = adapters.targets is None or name in adapters.targets
            if isinstance(child, nn.Linear) and child is not output and wanted:
                setattr(parent, name, _Adapted(child, adapters.rank, adapters.dtype))
                found += 1
    if not found:
        raise ConfigError(f"model.lora.target_modules: expected names of linear layers, found {adapters.targets}.")
    return model


def count_model(make: MakeModel, adapters: Adapters | None, weights: torch.dtype) -> ModelCounts:
    """Counts of the whole model, made on the meta device."""
    with torch.device("meta"):
        model = adapt(make(weights), adapters)
    layers = layers_of(model)
    in_layers = {id(weight) for weight in layers.parameters()}
    root = [weight for weight in model.parameters() if id(weight) not in in_layers]
    every, head = list(model.parameters()), list(model.get_output_embeddings().parameters())
    largest = max(layers, key=lambda layer: _numbers(layer.parameters()))
    return ModelCounts(
        num_parameters=_numbers(every),
        num_trained=_numbers(every, trained=True),
        weight_bytes=sum(weight.nbytes for weight in every),
        trained_bytes=sum(weight.nbytes for weight in every if weight.requires_grad),
        num_layers=len(layers),
        layer=_numbers(largest.parameters()),
        layer_trained=_numbers(largest.parameters(), trained=True),
        root=_numbers(root),
        root_trained=_numbers(root, trained=True),
        head=_numbers(head),
        head_trained=_numbers(head, trained=True),
        vocab_size=model.config.vocab_size,
    )


def probe_passes(make: MakeModel, adapters: Adapters | None, precision: Precision, shape: Shape) -> PassBytes:
    """Bytes that the passes of a run take at most, found by running them on tensors without memory."""
    group = -(-len(shape.lengths) // shape.group_size)
    prompts = [[i] * min(SHARED_PROMPT, shape.rollout // 2) for i in range(group)]
    tokens = [(prompts[i // shape.group_size] + [0] * length)[:length] for i, length in enumerate(shape.lengths)]
    shared = [min(len(prompts[0]), length - 1) for length in shape.lengths]
    arranged = LAYOUTS[shape.layout].arrange(PackedSequences.pack(tokens, prompt_lengths=shared))
    with FakeTensorMode(allow_non_fake_inputs=True):
        policy = Policy(adapt(make(precision.weights), adapters), shape.layout)
        for weight in policy.parameters():  # as in any micro-batch but the first
            weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
        with precision_of(precision):
            with first_layers(policy.model, 2):
                two = _there_and_back(policy, arranged)
            with first_layers(policy.model, 1):
                one = _there_and_back(policy, arranged)
                reading = _reading(policy, shape.reading)
                key = KVShape.of(policy)
    layer = two.kept - one.kept
    return PassBytes(
        num_tokens=arranged.token_ids.numel(),
        layer_kept=layer,
        layer_work=one.work,
        layer_input=one.states,
        around=one.kept - layer,
        head_rows=one.states * sum(shape.lengths) // arranged.token_ids.numel(),
        reading=reading,
        kv_row=key.bytes_per_token * len(layers_of(policy.model)) * shape.rollout,
    )


def probe_optimizer(make: MakeOptimizer, dtype: torch.dtype) -> OptimizerBytes:
    """What an optimizer keeps and makes, found in two steps on small weights as it would take them on a GPU.

    Args:
        make: the optimizer of given parameters.
        dtype: of the trained weights.
    """
    weights = [nn.Parameter(torch.zeros(64, 64, dtype=dtype)) for _ in range(16)]
    masters = MasterWeights(weights)  # as in training: float32 copies of narrow weights are part of what it keeps
    optimizer = masters.optimizer(make)
    for group in optimizer.param_groups:
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True  # the default on a GPU: all weights at once, and so all temporaries
    work = 0
    for _ in range(2):  # the first one makes the state
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        with LiveBytes() as live:
            masters.take_gradients()
            optimizer.step()
            optimizer.zero_grad()
        work = live.peak
    total = sum(weight.nbytes for weight in weights)
    tensors = [x for x in tree_leaves(list(optimizer.state.values())) if isinstance(x, Tensor)]
    state = sum(x.nbytes for x in tensors if x.numel() > 1)  # without counters
    state += sum(master.nbytes for weight, master in zip(weights, masters.masters, strict=True) if weight is not master)
    return OptimizerBytes(state / total, work / total)


def precision_of(precision: Precision) -> Any:
    """The context that passes run in."""
    dtype = precision.autocast
    # Without its cache, as Lightning has it.
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype, cache_enabled=False)


class _Pass(NamedTuple):
    """Bytes of one pass forward and backward."""

    states: int
    """Of its result."""
    kept: int
    """From forward to backward, the result and the input included."""
    work: int
    """What either pass has beyond them, at most: a layer that is computed again goes through both."""


def _there_and_back(policy: Policy, arranged: Arrangement) -> _Pass:
    embedded = policy.model.get_input_embeddings()(arranged.token_ids).detach().requires_grad_()
    with LiveBytes() as live:
        with attention_layout(policy.model, arranged.attention) as options:
            states: Tensor = policy.model.get_decoder()(
                inputs_embeds=embedded, position_ids=arranged.position_ids, use_cache=False, **options
            ).last_hidden_state
        kept, width = live.now, states.nbytes
        torch.autograd.backward([states], [torch.ones_like(states)])
    return _Pass(width, kept + embedded.nbytes, live.peak - kept)


@torch.no_grad()
def _reading(policy: Policy, num_tokens: int) -> int:
    """A pass of a rollout engine over that many tokens."""
    ids = torch.zeros(num_tokens, dtype=torch.long)
    with LiveBytes() as live:
        policy.advance(ids, torch.arange(num_tokens), CausalSegments([Segment(num_tokens)]), ids[:1])
    return live.peak


def layers_of(model: Any) -> nn.ModuleList:
    """A decoder's layers.

    Raises:
        ConfigError: it has none that can be found.
    """
    decoder = model.get_decoder()
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return module
    raise ConfigError(f"plan: expected a decoder with a list of layers, found none in a {model.config.model_type}.")


@contextmanager
def first_layers(model: Any, number: int) -> Iterator[None]:
    """Inside, the decoder has its first layers only."""
    layers = layers_of(model)
    every = list(layers)
    del layers[number:]
    try:
        yield
    finally:
        layers.extend(every[number:])


def _numbers(weights: Any, trained: bool = False) -> int:
    return sum(weight.numel() for weight in weights if weight.requires_grad or not trained)
