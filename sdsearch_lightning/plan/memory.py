"""Memory per GPU by part: the arithmetic, on counts that were found elsewhere.

A run has three moments at which memory is full, and each part is there at some of them:

    rollout    weights, optimizer state, keys and values of running rollouts
    backward   weights, optimizer state, gradients, what one micro-batch keeps for its backward pass, the output layer
    step       weights, optimizer state, gradients, what the optimizer makes on its way

The peak is the fullest of the three. What is assumed instead of counted stands in the constants below, and is told as
parts of their own. All sizes are bytes on one GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from sdsearch_lightning.policy.head import CHUNK_LOGITS, MAX_LOGITS, MIN_ROWS

GIB = 2**30
CONTEXT = 1.0 * GIB
"""Assumed: CUDA's own context, kernels and the workspaces of its libraries."""
COMMUNICATION = 1.0 * GIB
"""Assumed: NCCL's buffers, where several GPUs talk."""
SLACK = 0.05
"""Assumed: share of all tensors that the allocator cannot use, for its blocks do not fit."""
CHUNK_TENSORS = 12
"""Tensors of one chunk's logits in float32 that a loss has at once, gradient included (head.py)."""
SAMPLING_BYTES = 26
"""For each logit of a decoding pass: in compute precision, float32, log-probs, float64 and its running sum."""
PREFETCHED = 2
"""Layers whose weights fsdp2 has together at once: the one that computes, and the next."""

Parallel = Literal["one", "ddp", "ddp_views", "fsdp2"]
"""How GPUs share the work; ddp_views is DDP with gradient_as_bucket_view."""


@dataclass(frozen=True, slots=True)
class ModelCounts:
    """Of a model's weights; numbers, where it does not say bytes."""

    num_parameters: int
    num_trained: int
    weight_bytes: int
    """Of all weights, as they are kept."""
    trained_bytes: int
    """Of those that learn."""
    num_layers: int
    layer: int
    """Of the largest layer."""
    layer_trained: int
    root: int
    """Outside of the layers: embeddings, last norm, output layer."""
    root_trained: int
    head: int
    """Of the output layer."""
    head_trained: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class PassBytes:
    """Bytes that passes through the model take, beside its weights."""

    num_tokens: int
    """Tokens of the largest micro-batch, not bytes."""
    layer_kept: int
    """What one layer keeps for its backward pass."""
    layer_work: int
    """And what either pass makes beyond it, at its worst moment."""
    layer_input: int
    """What is kept of a layer that is computed again."""
    around: int
    """What is kept outside of the layers."""
    head_rows: int
    """Hidden rows of all tokens, as the output layer gets them."""
    reading: int
    """One rollout pass that reads prompts and documents."""
    kv_row: int
    """Keys and values of one rollout of full length."""


@dataclass(frozen=True, slots=True)
class OptimizerBytes:
    """Bytes that an optimizer takes per byte of trained weights."""

    state: float
    """Kept from step to step."""
    work: float
    """Made during a step."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that decides how much memory a run takes."""

    model: ModelCounts
    passes: PassBytes
    optimizer: OptimizerBytes
    parallel: Parallel
    num_gpus: int
    copies: Sequence[str]
    """Frozen copies of the policy: reference, teacher."""
    compute_bytes: int
    """Of a number in products: 2 in half precision."""
    head_bytes: int
    """Of a number in the output layer's product."""
    casts_head: bool
    """Whether the output layer's weights are cast for each product (autocast)."""
    checkpoints: bool
    """model.compute.gradient_checkpointing."""
    num_slots: int
    engine: int
    """Bytes of a rollout engine with memory of its own; 0 for the slot engine."""
    engine_asleep: int = 0
    """What of it stays while the policy trains."""

    @property
    def shards(self) -> int:
        """GPUs that share one copy of the weights."""
        return self.num_gpus if self.parallel == "fsdp2" else 1


@dataclass(frozen=True, slots=True)
class Part:
    """One row of the plan: what takes memory, and how much of it at each moment."""

    name: str
    rollout: float
    backward: float
    step: float
    why: str
    """What it is made of."""


def plan_parts(settings: Settings) -> list[Part]:
    """All parts of a run's memory on one GPU."""
    parts = [*_states(settings), *_rollout(settings), *_training(settings)]
    found = [Part(p.name, p.rollout, p.backward, p.step, p.why) for p in parts if max(p.rollout, p.backward, p.step)]
    sums = [SLACK * sum(getattr(part, moment) for part in found) for moment in ("rollout", "backward", "step")]
    fixed = CONTEXT + (COMMUNICATION if settings.num_gpus > 1 else 0)
    return [
        *found,
        Part("CUDA, assumed", fixed, fixed, fixed, "context and libraries 1 GiB" + ", NCCL 1 GiB" * (fixed > CONTEXT)),
        Part("allocator, assumed", sums[0], sums[1], sums[2], f"{SLACK:.0%} of all tensors"),
    ]


def peak(parts: Sequence[Part]) -> float:
    """Bytes of all parts at the fullest of the three moments."""
    return max(sum(getattr(part, moment) for part in parts) for moment in ("rollout", "backward", "step"))


def _states(s: Settings) -> Iterator[Part]:
    model, of = s.model, f" / {s.shards}" if s.shards > 1 else ""
    kept = model.weight_bytes / s.shards
    yield Part("weights", kept, kept, kept, f"{model.num_parameters / 1e9:.3g} B parameters{of}")
    for name in s.copies:
        yield Part(f"{name} copy", kept, kept, kept, f"frozen, no gradients{of}")
    state = s.optimizer.state * model.trained_bytes / s.shards
    told = f"{s.optimizer.state * model.trained_bytes / model.num_trained:.3g} bytes per trained parameter{of}"
    yield Part("optimizer state", state, state, state, told)
    gradients = model.trained_bytes / s.shards
    between = gradients if s.parallel == "ddp_views" else 0  # DDP's buckets, which they are then, stay
    yield Part("gradients", between, gradients, gradients, f"{model.num_trained / 1e9:.3g} B trained{of}")
    if s.parallel == "ddp":
        copies = model.trained_bytes
        yield Part("DDP buckets", copies, copies, copies, "gradients once more; none with gradient_as_bucket_view")


def _rollout(s: Settings) -> Iterator[Part]:
    if s.parallel == "fsdp2":
        whole = s.model.num_parameters * s.compute_bytes
        yield Part("gathered weights", whole, 0, 0, f"all, {s.compute_bytes} bytes each, while rollouts run")
    if s.engine:
        asleep = s.engine_asleep
        yield Part("rollout engine", s.engine, asleep, asleep, "its own weights, keys and values")
        return
    rows = s.num_slots * s.passes.kv_row
    yield Part("keys and values", rows, 0, 0, f"{s.num_slots} slots x {s.passes.kv_row / 2**20:.0f} MiB")
    cast = s.model.head * s.head_bytes if s.casts_head else 0
    work = max(s.passes.reading, s.num_slots * s.model.vocab_size * SAMPLING_BYTES + cast)
    yield Part("rollout passes", work, 0, 0, "reading documents, or sampling from logits")


def _training(s: Settings) -> Iterator[Part]:
    passes, layers = s.passes, s.model.num_layers
    if s.parallel == "fsdp2":
        gathered = (s.model.root + PREFETCHED * s.model.layer) * s.compute_bytes
        unreduced = (s.model.root_trained + PREFETCHED * s.model.layer_trained) * s.compute_bytes
        told = f"{PREFETCHED} layers, embeddings and output layer, and their gradients"
        yield Part("gathered layers", 0, gathered + unreduced, 0, told)
    each = passes.layer_input if s.checkpoints else passes.layer_kept
    kept = layers * each + passes.around
    how = "inputs" if s.checkpoints else "all"
    yield Part("activations", 0, kept, 0, f"{passes.num_tokens} tokens, {how} of {layers} layers")
    again = passes.layer_kept - passes.layer_input if s.checkpoints else 0  # its input is among those kept
    gradient = s.model.head_trained * _gradient_bytes(s)  # found going forward, it waits for the backward pass
    work = max(head_work(s) + 2 * passes.head_rows, gradient + again + passes.layer_work)
    yield Part("passes", 0, work, 0, "the output layer's logits and gradients, or one layer's backward pass")
    temporary = s.optimizer.work * s.model.trained_bytes / s.shards
    yield Part("optimizer's work", 0, 0, temporary, "temporaries; none where the optimizer is fused")


def head_work(s: Settings) -> int:
    """One pass through the output layer with its losses and their gradient; see head.py."""
    model, vocabulary = s.model, s.model.vocab_size
    logits = max(MIN_ROWS, MAX_LOGITS // vocabulary) * vocabulary * s.head_bytes
    chunk = max(1, CHUNK_LOGITS // vocabulary) * vocabulary * 4 * CHUNK_TENSORS
    so_far = model.head_trained * _gradient_bytes(s)  # the gradient of the passes before this one
    cast, cast_gradient = (n * s.head_bytes * s.casts_head for n in (model.head, model.head_trained))
    return logits + so_far + cast + max(chunk, so_far + cast_gradient)


def _gradient_bytes(s: Settings) -> int:
    """Of a number of the output layer's gradient: as the weight is when it computes."""
    if s.parallel == "fsdp2" or not s.model.num_trained:
        return s.compute_bytes
    return s.model.trained_bytes // s.model.num_trained
