"""The teacher's gate: is the teacher better than the student where outcomes differ, and is it because of the labels?

    python -m benchmarks.teacher_gate --run RUN [--config FILE] [--questions 120] [--samples 4] [--split val] [--seed 0]

The teacher is the policy itself with a hindsight block in its prompt. Where it answers no better than the policy
without one, there is nothing to distil; where a block with shuffled labels does as well, what helps are the queries. So
before anything is trained: groups of rollouts as training samples them, then answers anew in those with both outcomes,
with the same seeds and another text to read in each arm. docs/method.md says how to read what is printed.
"""

from __future__ import annotations

import json
import random
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from benchmarks.gate_arms import Asked, answer_anew, sample_groups, that_searched
from benchmarks.gate_logprobs import query_logprobs
from benchmarks.gate_report import SHUFFLED, STUDENT, TEACHER, Found, above_shuffled, arms_of, render, to_dict
from benchmarks.harness import environment
from sdsearch_lightning.cli.commands import guarded
from sdsearch_lightning.cli.errors import ShortErrorParser
from sdsearch_lightning.cli.parsers import split_keys
from sdsearch_lightning.cli.run_parser import RunParser
from sdsearch_lightning.datamodules import SearchDataModule
from sdsearch_lightning.errors import ConfigError, DataError
from sdsearch_lightning.files import write_text
from sdsearch_lightning.hindsight import BlockBuilder, NoLabels, Placebo, QueriesAndLabels, ShuffledLabels
from sdsearch_lightning.inference.opening import open_origin
from sdsearch_lightning.inference.origin import TRAINING, find_origin
from sdsearch_lightning.module import SDSearchModule
from sdsearch_lightning.report.summary import installed_versions
from sdsearch_lightning.rollout.groups import GroupSampler
from sdsearch_lightning.runs.threads import use_threads
from sdsearch_lightning.trust.secrets import without_secrets
from sdsearch_lightning.types import InstanceId, Question

NO_CORRECT_SAMPLES = 1
"""Of each group without a CORRECT rollout, where the teacher should be no better."""


def measure(
    module: SDSearchModule,
    sampler: GroupSampler,
    questions: Mapping[InstanceId, Question],
    group_size: int,
    samples: int,
    max_error_fraction: float = 0.2,
    say: Callable[[str], None] = lambda _: None,
) -> Found:
    """The whole gate, all draws from `sampler.seed`.

    Args:
        module: whose teacher it is; the weights of `sampler`.
        sampler: at the sampling of training.
        questions: one group of each.
        group_size: rollouts of a group.
        samples: answers of each arm in each mixed group.
        max_error_fraction: see `RolloutGrouping`.
        say: told what is done next: it may take long.

    Raises:
        DataError: no group has both outcomes and a search: there is nothing to compare.
    """
    seed = sampler.seed
    sampler.scoring.probe(next(iter(questions.values())))
    say(f"{len(questions)} groups of {group_size} rollouts")
    groups = sample_groups(sampler, questions, group_size, max_error_fraction)
    mixed, wrong = (that_searched(kind, sampler.codec) for kind in (groups.mixed, groups.all_wrong))
    if not mixed:
        kinds = ", ".join(f"{count} {kind}" for kind, count in groups.counts.items())
        raise DataError(
            f"teacher_gate: expected groups with a CORRECT and an INCORRECT rollout and a search, found none (groups: "
            f"{kinds}). Take more --questions, or a model that answers some of them."
        )
    teacher: dict[str, BlockBuilder | None] = {STUDENT: None, TEACHER: QueriesAndLabels()}
    controls: dict[str, BlockBuilder | None] = {
        SHUFFLED: ShuffledLabels(seed),
        "no labels": NoLabels(),
        "placebo": Placebo(),
    }
    asked = [Asked(mixed, teacher | controls, samples), Asked(wrong, teacher, NO_CORRECT_SAMPLES)]
    say(f"{samples} answers of {len(asked[0].arms)} arms in {len(mixed)} mixed groups, and in {len(wrong)} all wrong")
    of_mixed, of_wrong = answer_anew(sampler, asked, seed, max_error_fraction)
    module.eval()
    with sampler.opened():
        logprobs = query_logprobs(module, mixed)
    return Found(
        groups.counts,
        {"mixed": len(mixed), "all wrong": len(wrong)},
        arms_of(of_mixed, mixed, seed),
        arms_of(of_wrong, wrong, seed),
        above_shuffled(of_mixed, seed),
        logprobs,
    )


def draw_questions(data: SearchDataModule, split: str, count: int, seed: int) -> dict[InstanceId, Question]:
    """`count` questions of a split, or all where it has fewer, the same ones for a seed; by their place in it."""
    data.setup({"train": "fit", "val": "validate"}.get(split, split))
    if split == "train":
        found = list(data.training_questions)
    else:
        loader = data.val_dataloader() if split == "val" else data.test_dataloader()
        found = [question for batch in loader for question in batch.questions]
    if not found:
        raise ConfigError(f"data.{split}_files: expected questions to draw from, found none. Name another --split.")
    drawn = random.Random(f"{seed}/teacher-gate").sample(range(len(found)), min(count, len(found)))
    return {(0, place): found[place] for place in sorted(drawn)}


def gate(argv: Sequence[str]) -> None:
    """Reads the command line, measures, prints, and writes the file that was asked for."""
    own, keys = split_keys(argv)
    options = _parser().parse_args(own)
    for name in ("questions", "samples", "least"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name}: expected at least 1, found {getattr(options, name)}.")
    out = None if options.out is None else Path(options.out).expanduser().absolute()
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise ConfigError(f"out: expected a file in a folder that is there, found {options.out}.")
    given = [key.removeprefix("--").partition("=")[0] for key in keys]
    origin = find_origin(options.run, options.model, options.config or (), options.ckpt_path, given, TRAINING)
    use_threads(origin.num_threads)
    opened = open_origin(origin, keys, RunParser, seed=options.seed, device=options.device, rollout=TRAINING)
    size, data = opened.rollout.group_size, opened.data
    with closing(opened):
        if size < 2:
            raise ConfigError(f"rollout.group_size: expected at least 2, so that outcomes can differ, found {size}.")
        questions = draw_questions(data, options.split, options.questions, options.seed)
        _say(f"{origin.weights}: {len(questions)} questions of {options.split}")
        errors = opened.rollout.max_error_fraction
        found = measure(opened.module, opened.sampler, questions, size, options.samples, errors, _say)
    print("\n".join(render(found, options.least)))
    if out is not None:
        told = {
            "command": _command(argv),
            "environment": environment() | {"versions": installed_versions()},
            "weights": origin.weights,
            "split": options.split,
            "questions": [question.id for question in questions.values()],
            "seed": options.seed,
            "group_size": size,
            "samples": options.samples,
            "temperature": opened.sampler.sampling.temperature,
            "top_p": opened.sampler.sampling.top_p,
        }
        text = json.dumps(told | to_dict(found, options.least), indent=2, ensure_ascii=False)
        write_text(out, text + "\n")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> ShortErrorParser:
    parser = ShortErrorParser(
        prog="python -m benchmarks.teacher_gate",
        usage="python -m benchmarks.teacher_gate (--run RUN | --model FOLDER) [--config FILE] [--key value ...]",
        description="Is the teacher better than the student, and because of the labels? Keys of fit that begin with "
        "model., data. or rollout. are taken too, such as --rollout.group_size 8.",
    )
    add = parser.add_argument
    add("--run", type=str | None, help="run folder, or its name below runs/")
    add("--model", type=str | None, help="model folder, adapter folder or hub name, in place of a run")
    add("--config", type=str, action="append", help="a YAML file of keys; may be given several times, later ones win")
    add("--ckpt_path", type=str | None, help="checkpoint of the run, or last")
    add("--questions", type=int, default=120, help="questions to draw; each gets a group of rollouts")
    add("--samples", type=int, default=4, help="answers of each arm in each mixed group")
    add("--split", choices=("train", "val", "test"), default="val", help="where questions come from")
    add("--seed", type=int, default=0, help="of the questions and of all rollouts")
    add("--least", type=int, default=200, help="pairs of answers below which the verdict claims nothing")
    add("--out", type=str | None, help="JSON file to write")
    add("--device", type=str | None, help="where the model runs, such as cpu; null: a GPU where there is one")
    return parser


def _command(argv: Sequence[str]) -> str:
    """The command line without the secrets in it."""
    own, keys = split_keys(argv)
    pairs = [key.partition("=") for key in keys]
    safe = [f"{name}={without_secrets(value, name.removeprefix('--'))}" for name, _, value in pairs]
    return shlex.join(["python", "-m", "benchmarks.teacher_gate", *own, *safe])


def main(argv: Sequence[str]) -> int:
    """Runs the gate; returns its exit code."""
    return guarded(lambda: gate(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
