"""How far `sdsearch plan` is from the tensors of a real training step, whose bytes are added up one by one.

The step is the library's own: `SDSearchModule.attach`, `teacher_step`, `student_step`, backward and the optimizer, on
the largest micro-batch that the settings allow. The model's tensors are fake: they have the sizes of the run, but no
memory and no values; token ids and masks are real. The bytes are added up by torch's MemTracker, which shares nothing
with the plan's own counting. LoRA is the plan's stand-in for peft's layers. Counted on neither side: CUDA's context,
the allocator, and what a kernel makes and drops within itself; operations are those of torch's CPU.

    python -m benchmarks.plan_accuracy --config FILE [--config FILE ...] [--key value]     (the keys of fit; one GPU)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import MagicMock, patch

from benchmarks.harness import pin_threads

pin_threads()

import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.distributed._tools.mem_tracker import MemTracker  # noqa: E402

from sdsearch_lightning.cli.plan import PlanCLI  # noqa: E402
from sdsearch_lightning.losses.terms import total_loss  # noqa: E402
from sdsearch_lightning.plan.architecture import find_architecture  # noqa: E402
from sdsearch_lightning.plan.memory import GIB, Part, plan_parts  # noqa: E402
from sdsearch_lightning.plan.probe import MakeModel, adapt  # noqa: E402
from sdsearch_lightning.plan.settings import adapters_of, precision_of, settings_of  # noqa: E402
from sdsearch_lightning.policy import head  # noqa: E402
from sdsearch_lightning.policy.loading import word_level_tokenizer  # noqa: E402
from sdsearch_lightning.policy.policy import Policy  # noqa: E402
from sdsearch_lightning.step import policy_terms  # noqa: E402
from sdsearch_lightning.step.collate import SearchBatch, collate, split_groups, weigh  # noqa: E402
from sdsearch_lightning.types import (  # noqa: E402
    HindsightBlock,
    Question,
    RolloutGroup,
    Span,
    SpanKind,
    StopReason,
    Trajectory,
)

TOLERANCE = 0.15
PROMPT, BLOCK, SEARCHES = 256, 384, 5
"""Tokens of a prompt and of a hindsight block; searches of a rollout."""
PARTS = {
    "weights": ("weights", "reference copy", "teacher copy"),
    "gradients": ("gradients",),
    "optimizer state": ("optimizer state",),
    "activations and work": ("activations", "passes", "optimizer's work"),
}
"""Rows of the plan that are compared together."""


def rollout(group: int, index: int, length: int) -> Trajectory:
    """A rollout of exactly that many tokens: a third of what follows the prompt is the policy's, as with passages."""
    spans = [Span(SpanKind.PROMPT, (group,) * PROMPT)]
    turn = (length - PROMPT) // (SEARCHES + 1)
    for number in range(SEARCHES + 1):
        left = turn if number < SEARCHES else length - sum(len(span.token_ids) for span in spans)
        query, thought = min(20, left // 4), left // 3
        for kind, count in ((SpanKind.REASONING, thought), (SpanKind.QUERY, query)):
            spans.append(Span(kind, (1,) * count, (-1.0,) * count, sampled=True))
        spans.append(Span(SpanKind.OBSERVATION, (2,) * (left - query - thought)))
    return Trajectory(
        QUESTION, (0, group), index, tuple(spans), StopReason.ANSWERED, reward=1.0, advantage=0.5 - index, label=None
    )


QUESTION = Question("q", "a question", ("an answer",))


def largest_batch(module: Any, group_size: int, max_tokens: int) -> SearchBatch:
    """The largest micro-batch that the settings allow, both sides."""
    number = max(1, module.max_micro_batch_tokens // (group_size * max_tokens))
    rollouts = [[rollout(g, i, max_tokens) for i in range(group_size)] for g in range(number)]
    groups = [RolloutGroup(QUESTION, (0, g), tuple(members)) for g, members in enumerate(rollouts)]
    blocks = [HindsightBlock(g.instance_id, (), "block") for g in groups]
    weighed = weigh(groups, blocks, module.aggregation, module.aggregation_norm)
    (share,) = split_groups(weighed, max(module.max_micro_batch_tokens, group_size * max_tokens))
    return collate(share, lambda t, _: t.token_ids[:PROMPT] + (3,) * BLOCK)


@contextmanager
def without_values(mixture: Sequence[float]) -> Iterator[None]:
    """What asks for the value of a fake tensor gets one that changes no size; chunks are as large as on a GPU."""
    sums = policy_terms.policy_sums  # type: ignore[attr-defined]

    def policy_sums(logprobs: Any, chosen: Any, sampled: Any, old: Any, is_query: Any, *clips: float) -> Any:
        return sums(logprobs, chosen, sampled, old, is_query.nonzero()[:, 0], *clips)

    with ExitStack() as stack:
        enter = stack.enter_context
        enter(patch.object(policy_terms, "policy_sums", policy_sums))
        enter(patch.object(head, "CPU_CHUNK_LOGITS", head.CHUNK_LOGITS))
        enter(patch.object(FakeTensor, "tolist", lambda self: list(mixture)))
        enter(patch.object(Policy, "check", lambda self: None))
        enter(patch.object(Policy, "unpackable", None))
        yield


def as_on_gpu(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """With all weights in one pass, which is the default there."""
    for group in optimizer.param_groups:
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True
    return optimizer


class Tracker(MemTracker):
    """torch's own, without its account by module: that one knows neither frozen weights nor a module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self._mod_tracker = MagicMock(is_bw=False, parents=())

    def fullest(self) -> dict[str, int]:
        """Bytes by kind at the fullest point since the last call."""
        (found,) = self.get_tracker_snapshot("peak").values()
        self._peak_mem.clear()
        return {str(getattr(kind, "value", kind)): size for kind, size in found.items()}

    def _track_module_params_and_buffers(self, module: Any, install_grad_hooks: bool = True) -> tuple[int, int]:
        return super()._track_module_params_and_buffers(module, install_grad_hooks=False)


def measure(cli: PlanCLI, make: MakeModel, where: AbstractContextManager[Any]) -> dict[str, dict[str, int]]:
    """Bytes by kind of tensor at the fullest point of each moment.

    Args:
        cli: the settings.
        make: the model.
        where: FakeTensorMode, or nullcontext for real tensors.
    """
    module, options = cli.made.model, cli.options
    half, is_mixed = precision_of(options.trainer.precision)
    in_half = half is not None and not is_mixed
    adapters = adapters_of(options.model.get("lora"), half if half and in_half else torch.float32)
    with where:
        model = adapt(make(half if half and in_half else getattr(torch, options.model.dtype)), adapters)
    if adapters is not None:  # the frozen model is the reference, and the stand-in for peft's layers is on it already
        module.policy_terms, module.lora = replace(module.policy_terms, kl_coef=0.0), None
    module.attach(model, word_level_tokenizer([f"w{i}" for i in range(100)], module.protocol.tags))
    trained = [weight for weight in module.policy.parameters() if weight.requires_grad]
    optimizer = as_on_gpu(module._optimizer_specs[0].optimizer(trained))
    with where:  # gradients, as in any micro-batch but the first
        for weight in trained:
            weight.grad = torch.zeros_like(weight)
    batch = largest_batch(module, cli.made.rollout.group_size, cli.made.rollout.limits.max_tokens)
    module.jsd_weight = 1e-3
    optimizer.step()  # makes its state
    tracker = Tracker()
    tracker.track_external(module, optimizer)
    with tracker:
        optimizer.step()
        step = tracker.fullest()
        with torch.autocast("cpu", dtype=half or torch.bfloat16, enabled=is_mixed, cache_enabled=False):
            sums = module.student_step(batch, module.teacher_step(batch))
            loss = total_loss(sums.terms, module.policy_terms.coefficients(1e-3))
        loss.backward()
        backward = tracker.fullest()
    return {"step": step, "backward": backward}


def planned(parts: Sequence[Part], moment: str) -> dict[str, float]:
    """The plan's bytes at a moment, by the rows that are compared; without what it assumes."""
    by_name = {part.name: getattr(part, moment) for part in parts}
    return {row: sum(by_name.get(name, 0) for name in names) for row, names in PARTS.items()}


def main(argv: Sequence[str]) -> int:
    """Prints both sides, and their ratio; 1 where the plan is further than 15 % from the sum of tensors."""
    cli = PlanCLI(["fit", *argv])
    make, _ = find_architecture(cli.options.model.model_name_or_path, None)
    parts = plan_parts(settings_of(cli.options, cli.made, make, 80 * GIB))
    with without_values(cli.made.model.policy_terms.coefficients(1e-3)):
        measured = measure(cli, make, FakeTensorMode(allow_non_fake_inputs=True))
    ratios = []
    for moment, found in measured.items():
        ours = planned(parts, moment)
        print(f"{moment}, GiB of tensors")
        print("  plan:      " + ", ".join(f"{row} {size / GIB:.2f}" for row, size in ours.items()))
        kinds = {kind: size for kind, size in found.items() if kind != "Total" and size > 2**20}
        print("  by tensor: " + ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in kinds.items()))
        ratios.append(sum(ours.values()) / found["Total"])
        print(f"  {sum(ours.values()) / GIB:.2f} / {found['Total'] / GIB:.2f} = {ratios[-1]:.3f}", flush=True)
    return int(any(abs(ratio - 1) > TOLERANCE for ratio in ratios))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
