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

from sdsearch_lightning.collate import SearchBatch  # noqa: E402
from sdsearch_lightning.distillation import TeacherRows, divergence_to_teacher, summarize_teacher  # noqa: E402
from sdsearch_lightning.divergences import Divergence, JensenShannon  # noqa: E402
from sdsearch_lightning.head import Chunk, Head, Outcome, Reading, read_rows  # noqa: E402
from sdsearch_lightning.objective import EntropyCoefs, PolicyObjective  # noqa: E402
from sdsearch_lightning.packing import PackedSequences  # noqa: E402
from sdsearch_lightning.student import Student  # noqa: E402

VOCABULARY, TOKENS, POLICY_ROWS, QUERY_ROWS = 151_936, 512, 256, 64
TRL_CHUNK = 32_768
"""Vocabulary entries of a chunk, as TRL's divergence has it."""
OBJECTIVE = PolicyObjective(0.2, 0.2, 1.0, 0.0, EntropyCoefs(), None, 1.0)
EXACT = JensenShannon(top_k=None)
NAIVE, TRL, LIGER, OURS, PLAIN = "naive", "TRL", "Liger", "ours", "ours, plain autograd"
TOLERANCE = 1e-6
"""Of losses and gradients, relative, in float32."""
BARS: Mapping[str, Mapping[str, float]] = {"jsd": {NAIVE: 4.0, TRL: 1.5, LIGER: 1.2}, "step": {TRL: 1.3}}
"""Time of others over ours, at least."""
MEMORY_BAR = 3.0
"""Peak of the naive way over ours, at least."""
PEERS = {TRL: "trl", LIGER: "liger_kernel"}


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
    def make(cls, hidden_size: int, device: str, vocabulary: int = VOCABULARY) -> Inputs:
        """Random, and equal for equal arguments."""
        dice = torch.Generator().manual_seed(0)
        normal = partial(torch.randn, generator=dice)
        student = normal(TOKENS, hidden_size)
        teacher = student + 0.5 * normal(TOKENS, hidden_size)
        weight = nn.Parameter((2 * hidden_size**-0.5 * normal(vocabulary, hidden_size)).to(device))
        rows = (1 + torch.randperm(TOKENS - 1, generator=dice)[:POLICY_ROWS]).sort().values
        policy_weight = torch.zeros(TOKENS).index_fill(0, rows, 1 / POLICY_ROWS)
        batch = SearchBatch(
            PackedSequences.pack([torch.randint(vocabulary, (TOKENS,), generator=dice).tolist()]),
            policy_weight=policy_weight,
            sampled_logprobs=torch.zeros(TOKENS),
            advantages=normal(TOKENS),
            query_row=rows[: QUERY_ROWS * 2 : 2],
            query_weight=torch.full((QUERY_ROWS,), 1 / QUERY_ROWS),
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

    def policy_loss(self, logprobs: Tensor) -> Tensor:
        """The policy's term from the log-probs [R] of its tokens; the ratio is 1."""
        weight = (self.batch.policy_weight * self.batch.advantages)[self.policy + 1]
        return -((logprobs - logprobs.detach()).exp() * weight).sum()

    def tokens(self) -> Tensor:
        """[R] the policy's tokens."""
        return self.batch.token_ids[self.policy + 1]


Loss = Callable[[Inputs], Tensor]


def textbook_jsd(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """[Q] at beta 0.5."""
    student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    mixture = torch.logaddexp(student, teacher) - torch.tensor(2.0).log()
    return 0.5 * ((teacher.exp() * (teacher - mixture)).sum(-1) + (student.exp() * (student - mixture)).sum(-1))


# JSD at query rows


def naive_jsd(inputs: Inputs) -> Tensor:
    """All logits of both sides, and a mask at the end."""
    logits = linear(inputs.student, inputs.weight)
    with torch.no_grad():
        teacher = linear(inputs.teacher, inputs.weight)
    mask = torch.zeros(TOKENS, device=logits.device).index_fill(0, inputs.query, 1)
    return (textbook_jsd(logits, teacher) * mask).sum() / mask.sum()


def trl_jsd(inputs: Inputs) -> Tensor:
    """TRL's chunked divergence on gathered rows."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student, teacher = inputs.student[inputs.query], inputs.teacher[inputs.query]
    found = ChunkedDivergenceFunction.apply(student, inputs.weight, None, teacher, inputs.weight.detach(), None, 0.5)
    return found[0].mean()


def liger_jsd(inputs: Inputs) -> Tensor:
    """Liger's fused linear JSD on gathered rows, in one chunk."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    fused = LigerFusedLinearJSDLoss(
        weight_hard_loss=0, weight_soft_loss=1, beta=0.5, compiled=False, chunk_size=QUERY_ROWS
    )
    student, teacher = inputs.student[inputs.query], inputs.teacher[inputs.query]
    labels = torch.zeros(QUERY_ROWS, dtype=torch.long, device=student.device)
    return fused(student, inputs.weight, teacher, inputs.weight.detach(), labels)


def our_jsd(inputs: Inputs, divergence: Divergence = EXACT, mixture: Sequence[float] | None = (1.0,)) -> Tensor:
    """The library's reading of query rows, by itself; a limited support is chosen from the teacher's rows first."""
    teacher = read_teacher(inputs, divergence) if divergence.teacher_top_k is not None else hidden_teacher(inputs)

    def read(chunk: Chunk) -> tuple[Tensor, None]:
        found = divergence_to_teacher(divergence, chunk.logits, teacher.at(chunk.rows), chunk.paired)
        return (found * inputs.batch.query_weight[chunk.rows]).sum()[None], None

    reading = Reading(inputs.batch.query_row, read, teacher.hidden)
    return read_rows(inputs.head, [inputs.student[inputs.query]], [reading], mixture).terms[0]


def hidden_teacher(inputs: Inputs) -> TeacherRows:
    """The teacher's rows for the whole vocabulary, without what is kept for the report."""
    hidden = inputs.teacher[inputs.query]
    nothing = hidden.new_zeros(len(hidden))
    return TeacherRows(None, None, hidden, nothing, nothing, nothing, hidden.new_zeros(1, 5).long(), nothing)


@torch.no_grad()
def read_teacher(inputs: Inputs, divergence: Divergence) -> TeacherRows:
    """What the module keeps of its teacher's pass."""
    tokens, none = inputs.batch.token_ids[inputs.batch.query_row], inputs.batch.query_row[:0]

    def read(chunk: Chunk) -> tuple[Tensor, TeacherRows]:
        top_k = divergence.teacher_top_k
        return chunk.logits.new_zeros(0), summarize_teacher(chunk.logits, chunk.hidden, tokens[chunk.rows], top_k, none)

    reading = Reading(inputs.batch.query_row, read)
    return TeacherRows.join(read_rows(inputs.head, [inputs.teacher[inputs.query]], [reading], None).kept[0])


# A step: the policy's loss and the JSD


def naive_step(inputs: Inputs) -> Tensor:
    """All logits and log-probs, and masks at the end."""
    logits = linear(inputs.student, inputs.weight)
    with torch.no_grad():
        teacher = linear(inputs.teacher, inputs.weight)
    logprobs = logits.log_softmax(-1)[inputs.policy].gather(1, inputs.tokens()[:, None])[:, 0]
    mask = torch.zeros(TOKENS, device=logits.device).index_fill(0, inputs.query, 1)
    return inputs.policy_loss(logprobs) + (textbook_jsd(logits, teacher) * mask).sum() / mask.sum()


def trl_step(inputs: Inputs) -> Tensor:
    """TRL's two functions, one after the other; the entropy is for the log, as in its trainer."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    rows = inputs.student[inputs.policy]
    arguments = (inputs.weight, None, inputs.tokens(), 1.0, TRL_CHUNK, None, 1.0, ("entropy",))
    return inputs.policy_loss(ChunkedLogProbFunction.apply(rows, *arguments)[0]) + trl_jsd(inputs)


def our_step(inputs: Inputs, divergence: Divergence = EXACT, is_fused: bool = True) -> Tensor:
    """`Student.step` on these rows: with everything it counts for the report."""
    limited = divergence.teacher_top_k is not None
    teacher = read_teacher(inputs, divergence) if limited else hidden_teacher(inputs)

    def policy(
        sequences: PackedSequences, readings: Sequence[Reading], mixture: Sequence[float] | None = None
    ) -> Outcome:
        rows = [inputs.student[reading.targets - 1] for reading in readings]
        return read_rows(inputs.head, rows, readings, mixture if is_fused else None)

    student = Student(inputs.batch, OBJECTIVE, divergence, teacher, inputs.batch.query_row[:0])
    sums = student.step(policy, jsd_weight=1.0)  # type: ignore[arg-type]  # called, no more
    return OBJECTIVE.total(sums.policy_loss, sums.kl, sums.entropy_loss) + sums.jsd_loss


TOP = "ours, top 50"
JSD: Mapping[str, Loss] = {
    NAIVE: naive_jsd,
    TRL: trl_jsd,
    LIGER: liger_jsd,
    OURS: our_jsd,
    PLAIN: partial(our_jsd, mixture=None),
    TOP: partial(our_jsd, divergence=JensenShannon()),
}
STEP: Mapping[str, Loss] = {
    NAIVE: naive_step,
    TRL: trl_step,
    OURS: our_step,
    PLAIN: partial(our_step, is_fused=False),
    TOP: partial(our_step, divergence=JensenShannon()),
}
PARTS = {"jsd": JSD, "step": STEP}


def peak(part: str, variant: str, hidden_size: int, device: str) -> Iterator[str | None]:
    """For `peak_memory`; gradients are there already, as in every micro-batch but the first."""
    inputs = Inputs.make(hidden_size, device)
    inputs.student.grad, inputs.weight.grad = torch.zeros_like(inputs.student), torch.zeros_like(inputs.weight)
    yield None if device == "cpu" else device
    PARTS[part][variant](inputs).backward()


class Benchmark:
    """Inputs and a report.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.inputs = Inputs.make(options.hidden, options.device)
        self.report = Report(f"bench_loss_head_{options.hidden}", vars(options))

    def run(self, part: str) -> None:
        """Equality, time and peak memory of the variants of a part that can run here."""
        variants = dict(PARTS[part])
        for name in [name for name in variants if name in PEERS and find_spec(PEERS[name]) is None]:
            del variants[name]
            blank = dict.fromkeys(("figure", "minima", "bar", "verdict"))
            self.report.rows.append({"benchmark": part, "what": name, **blank, "note": "not installed"})
        self.check(part, variants)
        self.compare(part, variants)
        self.compare_memory(part, variants)

    def check(self, part: str, variants: Mapping[str, Loss]) -> None:
        """Equal losses and gradients; the top 50 is another loss."""
        expected = self._backward(variants[NAIVE])
        for name in [name for name in variants if name not in (NAIVE, TOP)]:
            pairs = zip(self._backward(variants[name]), expected, strict=True)
            error = max(float((mine - other).norm() / other.norm()) for mine, other in pairs)
            bar = Bar.counted(f"{name}: error of loss, dh, dW", error, at_most=TOLERANCE)
            self.report.add(part, bar, f"against {NAIVE}, relative")
        self._backward(variants[TOP])

    def compare(self, part: str, variants: Mapping[str, Loss]) -> None:
        """CPU time of each over ours."""

        def measure() -> list[Bar]:
            calls = {name: partial(self._backward, loss) for name, loss in variants.items()}
            timings = compare(calls, self.options.repetitions, warmup=0, device=self.options.device)
            for name, timing in timings.items():
                print(f"{part} {name:20} s: {' '.join(f'{sample:.2f}' for sample in timing.samples)}", flush=True)
            bounds = BARS[part] if (self.options.hidden, self.options.device) == (896, "cpu") else {}
            others = [name for name in variants if name != OURS]
            return [Bar.of(f"{name} / {OURS}", timings[name], timings[OURS], bounds.get(name)) for name in others]

        bars = measure()
        if not all(bar.is_met for bar in bars):
            bars = measure()
        for bar in bars:
            self.report.add(part, bar, "time")

    def compare_memory(self, part: str, variants: Mapping[str, Loss]) -> None:
        """Peak of each over ours."""
        settings = self.options.hidden, self.options.device
        peaks = {name: peak_memory("benchmarks.bench_loss_head:peak", part, name, *settings) for name in variants}
        for name in [name for name in variants if name != OURS]:
            bound = MEMORY_BAR if name == NAIVE else None
            bar = Bar.counted(f"{name} / {OURS}", peaks[name] / peaks[OURS], bound)
            self.report.add(part, bar, f"peak memory, {peaks[name]:.0f} / {peaks[OURS]:.0f} MB")

    def _backward(self, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, and its gradients in hidden rows and weights."""
        inputs = self.inputs
        inputs.student.grad = inputs.weight.grad = None
        value = loss(inputs)
        value.backward()
        assert inputs.student.grad is not None and inputs.weight.grad is not None
        return value.detach(), inputs.student.grad, inputs.weight.grad


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
