"""The output layer and the losses on its logits, at a real vocabulary: forward, backward and the gradient of W.

Hidden rows of 512 tokens are given, of which few are needed. `jsd` compares student and teacher at 64 query rows;
`step` adds the policy's loss at 256 rows, the query rows among them, as one training step does. First all variants have
to agree on loss and gradients. A peer that is not installed is left out:

    pip install "trl==1.16.*" && pip install --no-deps liger-kernel==0.8.5
    python -m benchmarks.bench_loss_head [--hidden 256] [--device cuda] [--parts jsd step]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

from benchmarks.harness import Bar, Report, compare, peak_memory, pin_threads

pin_threads()

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.functional import linear  # noqa: E402

from sdsearch_lightning.losses.divergences import Divergence, JensenShannon  # noqa: E402
from sdsearch_lightning.losses.teacher_use import Distillation  # noqa: E402
from sdsearch_lightning.losses.terms import total_loss  # noqa: E402
from sdsearch_lightning.losses.weights import EntropyCoefs  # noqa: E402
from sdsearch_lightning.policy.head import Chunk, Head, Outcome, Reading, read_rows  # noqa: E402
from sdsearch_lightning.policy.packing import PackedSequences  # noqa: E402
from sdsearch_lightning.step.collate import SearchBatch  # noqa: E402
from sdsearch_lightning.step.policy_terms import PolicyTerms  # noqa: E402
from sdsearch_lightning.step.student import Student  # noqa: E402
from sdsearch_lightning.step.teacher_rows import TeacherRows, divergence_to_teacher, join, summarize_teacher  # noqa: E402

VOCABULARY, TOKENS, POLICY_ROWS, QUERY_ROWS = 151_936, 512, 256, 64
TRL_CHUNK = 32_768  # entries of the vocabulary, as in TRL's divergence
POLICY_TERMS = PolicyTerms(0.2, 0.2, 1.0, 0.0, EntropyCoefs(), None, 1.0)
EXACT, TOP_50 = JensenShannon(top_k=None), JensenShannon()
NAIVE, TRL, LIGER = "naive", "TRL", "Liger"
OURS, PLAIN, TOP = "ours", "ours, plain autograd", "ours, top 50"
TOLERANCE, PEERS_TOLERANCE = 1e-6, 5e-6
"""Of losses and gradients, relative, in float32; peers add up in an order of their own."""
BARS: Mapping[str, Mapping[str, float]] = {"jsd": {NAIVE: 4.0, TRL: 1.5, LIGER: 1.2}, "step": {TRL: 1.3}}
"""Time of others over ours, at least."""
MEMORY_BAR = 3.0  # peak of the naive way over ours, at least
PEERS, BLANK = {TRL: "trl", LIGER: "liger_kernel"}, dict.fromkeys(("figure", "minima", "bar", "verdict"))


@dataclass(frozen=True)
class Inputs:
    """Hidden rows of T tokens, an output layer, and one micro-batch that says what its rows are."""

    student: Tensor
    """[T, H], a leaf."""
    teacher: Tensor
    """[T, H]."""
    weight: nn.Parameter
    """[V, H]."""
    batch: SearchBatch

    @classmethod
    def make(cls, hidden_size: int, device: str) -> Inputs:
        """Random, and equal for equal arguments."""
        dice = torch.Generator().manual_seed(0)
        normal = partial(torch.randn, generator=dice)
        student = normal(TOKENS, hidden_size)
        teacher = student + 0.5 * normal(TOKENS, hidden_size)
        weight = nn.Parameter((2 * hidden_size**-0.5 * normal(VOCABULARY, hidden_size)).to(device))
        rows = (1 + torch.randperm(TOKENS - 1, generator=dice)[:POLICY_ROWS]).sort().values
        batch = SearchBatch(
            PackedSequences.pack([torch.randint(VOCABULARY, (TOKENS,), generator=dice).tolist()]),
            policy_weight=torch.zeros(TOKENS).index_fill(0, rows, 1 / POLICY_ROWS),
            sampled_logprobs=torch.zeros(TOKENS),
            advantages=normal(TOKENS),
            query_row=rows[: QUERY_ROWS * 2 : 2],
            query_weight=torch.full((QUERY_ROWS,), 1 / QUERY_ROWS),
            query_label=torch.zeros(QUERY_ROWS),
            span_kind=torch.zeros(TOKENS, dtype=torch.long),
            on_policy=True,
        )
        return cls(student.to(device).requires_grad_(), teacher.to(device), weight, batch.to(device))

    @property
    def head(self) -> Head:
        return Head(lambda rows: linear(rows, self.weight), (self.weight,), len(self.weight))

    @property
    def query(self) -> Tensor:
        """[Q] rows that predict query tokens."""
        return self.batch.query_row - 1

    @property
    def policy(self) -> Tensor:
        """[R] rows that predict tokens of the policy."""
        return self.batch.policy_weight.nonzero()[:, 0] - 1

    @property
    def tokens(self) -> Tensor:
        """[R] tokens that the policy wrote."""
        return self.batch.token_ids[self.policy + 1]

    def policy_loss(self, logprobs: Tensor) -> Tensor:
        """From their log-probs [R]; the ratio is 1."""
        weight = (self.batch.policy_weight * self.batch.advantages)[self.policy + 1]
        return -((logprobs - logprobs.detach()).exp() * weight).sum()


Loss = Callable[[Inputs], Tensor]


def textbook_jsd(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """[Q] at beta 0.5."""
    student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    mixture = torch.logaddexp(student, teacher) - torch.tensor(2.0).log()
    return 0.5 * ((teacher.exp() * (teacher - mixture)).sum(-1) + (student.exp() * (student - mixture)).sum(-1))


def naive_jsd(inputs: Inputs) -> Tensor:
    """All logits of both sides, and a mask at the end."""
    student = linear(inputs.student, inputs.weight)
    with torch.no_grad():
        teacher = linear(inputs.teacher, inputs.weight)
    mask = torch.zeros(TOKENS, device=student.device).index_fill(0, inputs.query, 1)
    return (textbook_jsd(student, teacher) * mask).sum() / mask.sum()


def trl_jsd(inputs: Inputs) -> Tensor:
    """TRL's chunked divergence on gathered rows."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student, teacher = inputs.student[inputs.query], inputs.teacher[inputs.query]
    arguments = (student, inputs.weight, None, teacher, inputs.weight.detach(), None, 0.5)
    return ChunkedDivergenceFunction.apply(*arguments)[0].mean()


def liger_jsd(inputs: Inputs) -> Tensor:
    """Liger's fused linear JSD on gathered rows, in one chunk."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    settings = {"weight_hard_loss": 0, "weight_soft_loss": 1, "beta": 0.5, "chunk_size": QUERY_ROWS}
    student, teacher = inputs.student[inputs.query], inputs.teacher[inputs.query]
    fused, labels = LigerFusedLinearJSDLoss(**settings, compiled=False), inputs.batch.query_row  # ignores none of them
    return fused(student, inputs.weight, teacher, inputs.weight.detach(), labels)


def our_jsd(inputs: Inputs, divergence: Divergence = EXACT, mixture: Sequence[float] | None = (1.0,)) -> Tensor:
    """The library's reading of query rows, by itself."""
    teacher = teacher_rows(inputs, divergence)

    def read(chunk: Chunk) -> tuple[Tensor, None]:
        found = divergence_to_teacher(divergence, chunk.logits, teacher.at(chunk.rows), chunk.paired)
        return (found * inputs.batch.query_weight[chunk.rows]).sum()[None], None

    reading = Reading(inputs.batch.query_row, read, teacher.hidden)
    return read_rows(inputs.head, [inputs.student[inputs.query]], [reading], mixture).terms[0]


@torch.no_grad()
def teacher_rows(inputs: Inputs, divergence: Divergence) -> TeacherRows:
    """What the module keeps of its teacher: read here for a limited support, only hidden rows for the vocabulary."""
    hidden, tokens = inputs.teacher[inputs.query], inputs.batch.token_ids[inputs.batch.query_row]
    top_k, nothing = divergence.teacher_top_k, inputs.batch.query_row[:0]
    if top_k is None:
        zero = hidden.new_zeros(len(hidden))
        return TeacherRows(None, None, hidden, zero, zero, zero, zero[:, None].long(), zero[:, None])

    def read(chunk: Chunk) -> tuple[Tensor, TeacherRows]:
        rows = summarize_teacher(chunk.logits, chunk.hidden, tokens[chunk.rows], top_k, nothing)
        return chunk.logits.new_zeros(0), rows

    return join(read_rows(inputs.head, [hidden], [Reading(inputs.batch.query_row, read)], None).kept[0])


def textbook_step(inputs: Inputs) -> Tensor:
    """Both terms by plain formulas; to compare with, and never timed."""
    logprobs = linear(inputs.student[inputs.policy], inputs.weight).log_softmax(-1)
    chosen = logprobs.gather(1, inputs.tokens[:, None])[:, 0]
    student, teacher = (linear(x[inputs.query], inputs.weight) for x in (inputs.student, inputs.teacher))
    return inputs.policy_loss(chosen) + textbook_jsd(student, teacher.detach()).mean()


def trl_step(inputs: Inputs) -> Tensor:
    """TRL's two functions, one after the other; the entropy is for the log, as in its trainer."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    rows = inputs.student[inputs.policy]
    arguments = (inputs.weight, None, inputs.tokens, 1.0, TRL_CHUNK, None, 1.0, ("entropy",))
    return inputs.policy_loss(ChunkedLogProbFunction.apply(rows, *arguments)[0]) + trl_jsd(inputs)


def our_step(inputs: Inputs, divergence: Divergence = EXACT, is_fused: bool = True) -> Tensor:
    """`Student.step` on these rows: with everything it counts for the report."""

    def policy(sequences: object, readings: Sequence[Reading], mixture: Sequence[float]) -> Outcome:
        rows = [inputs.student[reading.targets - 1] for reading in readings]
        return read_rows(inputs.head, rows, readings, mixture if is_fused else None)

    teacher = teacher_rows(inputs, divergence)
    student = Student(inputs.batch, POLICY_TERMS, divergence, Distillation(), teacher, inputs.batch.query_row[:0])
    sums = student.step(policy, jsd_weight=1.0)  # type: ignore[arg-type]  # called, no more
    return total_loss(sums.terms, POLICY_TERMS.coefficients(1.0))


JSD: Mapping[str, Loss] = {NAIVE: naive_jsd, TRL: trl_jsd, LIGER: liger_jsd, OURS: our_jsd}
STEP: Mapping[str, Loss] = {TRL: trl_step, OURS: our_step}
PARTS: Mapping[str, Mapping[str, Loss]] = {
    "jsd": {**JSD, PLAIN: partial(our_jsd, mixture=None), TOP: partial(our_jsd, divergence=TOP_50)},
    "step": {**STEP, PLAIN: partial(our_step, is_fused=False), TOP: partial(our_step, divergence=TOP_50)},
}
REFERENCES = {"jsd": naive_jsd, "step": textbook_step}


def peak(part: str, variant: str, hidden_size: int, device: str) -> Iterator[str | None]:
    """For `peak_memory`; gradients are there already, as in every micro-batch but the first."""
    inputs = Inputs.make(hidden_size, device)
    inputs.student.grad, inputs.weight.grad = torch.zeros_like(inputs.student), torch.zeros_like(inputs.weight)
    yield None if device == "cpu" else device
    PARTS[part][variant](inputs).backward()


class Benchmark:
    """Inputs and a report."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.inputs = Inputs.make(options.hidden, options.device)
        self.has_bars = (options.hidden, options.device) == (896, "cpu")
        self.report = Report(f"bench_loss_head_{options.hidden}", vars(options))

    def run(self, part: str) -> None:
        """Equality, time and peak memory of the variants of a part that can run here."""
        missing = [name for name in PARTS[part] if name in PEERS and find_spec(PEERS[name]) is None]
        variants = {name: loss for name, loss in PARTS[part].items() if name not in missing}
        for step in (self.check, self.compare, self.compare_memory):
            step(part, variants)
        for name in missing:
            self.report.rows.append(BLANK | {"benchmark": part, "what": name, "note": "not installed"})

    def check(self, part: str, variants: Mapping[str, Loss]) -> None:
        """Equal losses and gradients; the top 50 is another loss."""
        expected = self._backward(REFERENCES[part])
        for name, loss in variants.items():
            found = self._backward(loss)
            if name not in (NAIVE, TOP):
                error = max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
                bound = PEERS_TOLERANCE if name in PEERS else TOLERANCE
                self.report.add(part, Bar.counted(f"{name}: error of loss, dh, dW", error, at_most=bound), "relative")

    def compare(self, part: str, variants: Mapping[str, Loss]) -> None:
        """CPU time of each over ours."""

        def measure() -> list[Bar]:
            calls = {name: partial(self._backward, loss) for name, loss in variants.items()}
            timings = compare(calls, self.options.repetitions, warmup=0, device=self.options.device)
            for name, timing in timings.items():
                print(f"{part} {name:20} s: {' '.join(f'{sample:.2f}' for sample in timing.samples)}", flush=True)
            bounds = BARS[part] if self.has_bars else {}
            pairs = {name: (timing, timings[OURS]) for name, timing in timings.items() if name != OURS}
            return [Bar.of(f"{name} / {OURS}", *pair, bounds.get(name)) for name, pair in pairs.items()]

        bars = measure()
        if not all(bar.is_met for bar in bars):
            bars = measure()
        for bar in bars:
            self.report.add(part, bar, "time")

    def compare_memory(self, part: str, variants: Mapping[str, Loss]) -> None:
        """Peak of each over ours."""
        path, settings = "benchmarks.bench_loss_head:peak", (self.options.hidden, self.options.device)
        peaks = {name: peak_memory(path, part, name, *settings) for name in variants if name != TOP}
        ours = peaks.pop(OURS)
        for name, other in peaks.items():
            bound = MEMORY_BAR if self.has_bars and name == NAIVE else None
            bar = Bar.counted(f"{name} / {OURS}", other / ours, bound)
            self.report.add(part, bar, f"peak memory, {other:.0f} / {ours:.0f} MB")

    def _backward(self, loss: Loss) -> list[Tensor]:
        """Loss, and its gradients in hidden rows and weights."""
        leaves = self.inputs.student, self.inputs.weight
        for leaf in leaves:
            leaf.grad = None
        value = loss(self.inputs)
        value.backward()
        return [value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts asked for; the exit code is 1 where a bar was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_loss_head", description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=896, help="bars are on 896")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=sorted(PARTS), default=list(PARTS))
    benchmark = Benchmark(parser.parse_args(argv))
    for part in benchmark.options.parts:
        benchmark.run(part)
    return benchmark.report.finish()


if __name__ == "__main__":
    sys.exit(main())
