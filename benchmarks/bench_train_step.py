"""Forward and backward of one group of rollouts: what padding, masks, unused logits and repeated prompts cost.

Two ways outside of the library are compared with its three layouts, through `SDSearchModule.student_step`. First all
have to give equal losses and gradients: to 1e-10 in float64, on a family that computes its norms in float64 too.

    python -m benchmarks.bench_train_step [--size small] [--device cuda]
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

from benchmarks.harness import Bar, Report, compare, peak_memory, pin_threads

pin_threads()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.workload import make_policy  # noqa: E402
from sdsearch_lightning.losses.terms import total_loss  # noqa: E402
from sdsearch_lightning.module import SDSearchModule  # noqa: E402
from sdsearch_lightning.policy.loading import ScratchModel, word_level_tokenizer  # noqa: E402
from sdsearch_lightning.policy.packing import PackedSequences  # noqa: E402
from sdsearch_lightning.step.collate import SearchBatch, TeacherPrompt, collate, weigh  # noqa: E402
from sdsearch_lightning.training.options import Compute  # noqa: E402
from sdsearch_lightning.types import (  # noqa: E402
    HindsightBlock,
    Question,
    RolloutGroup,
    Span,
    SpanKind,
    StopReason,
    Trajectory,
)

NAIVE, MASKED = "naive", "left-padded, rows"
LAYOUTS = ("padded", "packed", "shared_prefix")


@dataclass(frozen=True, slots=True)
class Case:
    """A group of rollouts, and the precision of the model that reads it."""

    lengths: tuple[int, ...]
    """Tokens of each rollout, prompt included."""
    dtype: torch.dtype
    tolerance: float
    """Of losses and gradients, relative."""
    prompt: int = 150
    document: int = 200
    query: int = 12
    """Tokens of each."""


CASES = {
    "tiny": Case((174, 310, 420, 455, 480, 560, 675, 875), torch.float32, 1e-5),
    "small": Case((240, 480, 590, 665, 780, 969), torch.bfloat16, 5e-2),
    "0.5b": Case((700, 900, 1100, 1300), torch.bfloat16, 5e-2, 200, 250),
    "3b": Case((700, 900, 1100, 1300), torch.bfloat16, 5e-2, 200, 250),
    "exact": Case((22, 31, 36, 44, 52), torch.float64, 1e-10, prompt=12, document=9, query=3),
}
BARS = {
    (MASKED, "packed"): 1.7,
    (MASKED, "shared_prefix"): 2.0,
    (NAIVE, "shared_prefix"): 2.2,
}
"""Time of the one over the other, at least."""


def make_group(case: Case, vocabulary: int, seed: int = 0) -> RolloutGroup:
    """A group of finished rollouts of random tokens; equal arguments, equal group."""
    dice = random.Random(seed)
    question, instance_id = Question("q0", "synthetic", ("",)), (0, 0)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(dice.choices(range(1, vocabulary), k=count))

    def sampled(kind: SpanKind, count: int) -> Span:
        return Span(kind, draw(count), (-1.0,) * count, sampled=True)

    prompt = Span(SpanKind.PROMPT, draw(case.prompt))
    trajectories = []
    for index, length in enumerate(case.lengths):
        rest = length - case.prompt
        num_searches = rest // (case.document + 2 * case.query)
        segment, more = divmod(rest - num_searches * case.document, num_searches + 1)
        spans = [prompt]
        for _ in range(num_searches):
            spans += [sampled(SpanKind.REASONING, segment - case.query - 1)] if segment > case.query + 1 else []
            spans += [sampled(SpanKind.QUERY, min(case.query, segment - 1)), sampled(SpanKind.SCAFFOLD, 1)]
            spans += [Span(SpanKind.OBSERVATION, draw(case.document))]
        spans += [sampled(SpanKind.ANSWER, segment + more)]
        advantage, queries = dice.gauss(0, 1), tuple(f"query {i}" for i in range(num_searches))
        identity = question, instance_id, index
        trajectories.append(
            Trajectory(*identity, tuple(spans), StopReason.ANSWERED, queries, ((),) * num_searches, advantage=advantage)
        )
    return RolloutGroup(question, instance_id, tuple(trajectories))


def make_batch(
    groups: Sequence[RolloutGroup],
    dtype: torch.dtype,
    teacher_prompt: TeacherPrompt | None = None,
    cut_teacher: bool = True,
) -> SearchBatch:
    """One micro-batch of the groups, as the module makes it; taught where there is a prompt for the teacher."""
    blocks = [HindsightBlock(group.instance_id, (), "block") if teacher_prompt else None for group in groups]
    wide = torch.promote_types(dtype, torch.float32)
    weighed = weigh(groups, blocks, "token-mean", dtype=wide)
    batch = collate(list(chain(*weighed)), teacher_prompt, dtype=wide, cut_teacher=cut_teacher)
    return replace(batch, on_policy=True)


def make_module(model: Any, layout: str) -> SDSearchModule:
    """The module around a given model; without a reference."""
    module = SDSearchModule(scratch=ScratchModel(), compute=Compute(layout), kl_coef=0.0)  # type: ignore[arg-type]
    module.attach(model, word_level_tokenizer((), module.protocol.tags))
    return module


def make_model(size: str, device: str = "cpu") -> Any:
    """Random weights; `exact` is a family without a norm in float32."""
    if size != "exact":
        return make_policy(size, CASES[size].dtype, device).model
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return PhiForCausalLM(PhiConfig(**sizes, num_attention_heads=4, initializer_range=0.2)).double()


def left_pad(sequences: PackedSequences) -> tuple[dict[str, Tensor], Tensor]:
    """What a stock model is given for left-padded rows, and the column [T] of each token."""
    tokens, length = sequences.token_ids, sequences.max_length
    missing = length - torch.tensor(sequences.lengths, device=tokens.device)
    column = sequences.position_ids + missing[sequences.sequence_index]

    def placed(values: Tensor) -> Tensor:
        place = sequences.sequence_index, column
        return tokens.new_zeros(sequences.num_sequences, length).index_put(place, values)

    mask = placed(torch.ones_like(tokens))
    positions = placed(sequences.position_ids)
    return {"input_ids": placed(tokens), "attention_mask": mask, "position_ids": positions}, column


class LeftPadded:
    """A batch as it is often run: padding on the left, a mask of it, and the policy's log-probs.

    Args:
        model: a Hugging Face causal LM.
        batch: of the library; its padded copy is made here, outside of what is timed.
        all_logits: whether the output layer runs on every token, padding included.
    """

    def __init__(self, model: Any, batch: SearchBatch, all_logits: bool) -> None:
        self.model, self.all_logits = model, all_logits
        self.inputs, column = left_pad(batch.sequences)
        policy = batch.policy_weight.nonzero()[:, 0]
        self.row, self.column = batch.sequence_index[policy], column[policy]
        self.tokens = batch.token_ids[policy]
        self.weight = (batch.policy_weight * batch.advantages)[policy]

    def loss(self) -> Tensor:
        """Of the policy, on policy: the ratio is 1."""
        if self.all_logits:
            logits = self.model(**self.inputs, use_cache=False).logits
            logprobs = self._wide(logits).log_softmax(-1)[self.row, self.column - 1, self.tokens]
        else:
            states = self.model.get_decoder()(**self.inputs, use_cache=False).last_hidden_state
            logits = self.model.get_output_embeddings()(states[self.row, self.column - 1])
            logprobs = self._wide(logits).log_softmax(-1).gather(1, self.tokens[:, None])[:, 0]
        return -((logprobs - logprobs.detach()).exp() * self.weight).sum()

    @staticmethod
    def _wide(logits: Tensor) -> Tensor:
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def student_loss(module: SDSearchModule, batch: SearchBatch) -> Tensor:
    """The policy's loss by the library, with all that it counts for the report."""
    sums = module.student_step(batch)
    return total_loss(sums.terms, module.policy_terms.coefficients(module.jsd_weight))


def losses(model: Any, batch: SearchBatch) -> dict[str, Callable[[], Tensor]]:
    """What is compared, by name."""
    others = {name: LeftPadded(model, batch, name == NAIVE).loss for name in (NAIVE, MASKED)}
    return others | {layout: partial(student_loss, make_module(model, layout), batch) for layout in LAYOUTS}


def backward(model: Any, loss: Callable[[], Tensor]) -> Tensor:
    """The loss, with fresh gradients in the model."""
    model.zero_grad(set_to_none=True)
    value = loss()
    value.backward()
    return value.detach()


def prepare(size: str, device: str) -> tuple[Any, SearchBatch]:
    """Model and batch of a case."""
    model = make_model(size, device)
    group = make_group(CASES[size], model.config.vocab_size)
    return model, make_batch([group], CASES[size].dtype).to(device)


def peak(size: str, variant: str, device: str) -> Iterator[str | None]:
    """For `peak_memory`; gradients are there already, as in every micro-batch but the first."""
    model, batch = prepare(size, device)
    loss = losses(model, batch)[variant]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    yield None if device == "cpu" else device
    loss().backward()


def check(report: Report, size: str, device: str) -> None:
    """Equal losses and gradients, against rows of left-padded tokens."""
    model, batch = prepare(size, device)
    variants = losses(model, batch)

    def found(name: str) -> tuple[Tensor, Tensor]:
        loss = backward(model, variants[name])
        return loss, torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])

    expected = found(MASKED)
    for name in [name for name in variants if name != MASKED]:
        error = max(
            float((mine - other).norm() / other.norm()) for mine, other in zip(found(name), expected, strict=True)
        )
        bar = Bar.counted(f"{name}: error", error, at_most=CASES[size].tolerance)
        report.add("equality", bar, f"loss and gradients, {size}, {CASES[size].dtype}, against {MASKED}")


def compare_times(report: Report, options: argparse.Namespace) -> None:
    """CPU time of each way over each layout that has a bar; tokens are those of rollouts, without padding."""
    model, batch = prepare(options.size, options.device)
    calls = {name: partial(backward, model, loss) for name, loss in losses(model, batch).items()}

    def measure() -> tuple[list[Bar], dict[str, str]]:
        timings = compare(calls, options.repetitions, warmup=0, device=options.device)
        for name, timing in timings.items():
            print(f"{name:20} s: {' '.join(f'{sample:.2f}' for sample in timing.samples)}", flush=True)
        bounds = BARS if options.device == "cpu" else dict.fromkeys(BARS)
        pairs = [(above, below) for below in LAYOUTS for above in (NAIVE, MASKED)]
        bars = [Bar.of(f"{a} / {b}", timings[a], timings[b], bounds.get((a, b))) for a, b in pairs]
        return bars, {name: f"{len(batch.token_ids) / t.median:.0f} tokens/s" for name, t in timings.items()}

    bars, rates = measure()
    if not all(bar.is_met for bar in bars):
        bars, rates = measure()
    for bar in bars:
        above, below = bar.name.split(" / ")
        report.add("time", bar, f"{rates[below]} instead of {rates[above]}")


def compare_memory(report: Report, options: argparse.Namespace) -> None:
    """Peak of each way over that of the default layout."""
    names = (NAIVE, MASKED, *LAYOUTS)
    peaks = {n: peak_memory("benchmarks.bench_train_step:peak", options.size, n, options.device) for n in names}
    for name in names[:-1]:
        bar = Bar.counted(f"{name} / {LAYOUTS[-1]}", peaks[name] / peaks[LAYOUTS[-1]])
        report.add("peak memory", bar, f"{peaks[name]:.0f} / {peaks[LAYOUTS[-1]]:.0f} MB")


def main(argv: Sequence[str] | None = None) -> int:
    """Equality, time and memory; the exit code is 1 where a bar was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_train_step", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("tiny", "small"), default="tiny", help="tiny: float32, small: bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args(argv)
    report = Report(f"bench_train_step_{options.size}", vars(options))
    check(report, "exact", options.device)
    check(report, options.size, options.device)
    compare_times(report, options)
    compare_memory(report, options)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
