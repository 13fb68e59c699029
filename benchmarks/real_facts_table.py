"""Evaluations of the real facts side by side: exact match by hops, whether every fact was found, paired differences.

    python -m benchmarks.real_facts_table data/real_facts/test.jsonl runs/test_a runs/test_b ...

Each folder is a run of `sdsearch test` on that file. Differences are to the first, over the questions that both were
asked, with 95 % intervals by bootstrap over questions: they say how sure it is that these two models differ, and not
what another seed would do.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.gate_statistics import Estimate, Values, mean_over_groups, paired_over_groups
from benchmarks.markdown import header, row
from sdsearch_lightning.report.trajectories import read_trajectories

Hops = Sequence[Sequence[str]]
"""Of a question: relation, what is looked up, what is found."""


COLUMNS = ("run", "hops", "questions", "EM [95 %]", "minus the first [95 %]", "searches", "all found", "EM then")


@dataclass(frozen=True, slots=True)
class Asked:
    """What one greedy rollout of a question came to."""

    hops: int
    is_right: bool
    is_found: bool
    """Whether each fact of the chain stood in a passage that was read."""
    searches: int


def read_hops(path: Path) -> dict[str, Hops]:
    """The chains of a file of questions, by question id."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {found["id"]: found["metadata"]["hops"] for found in rows}


def read_asked(run: Path, chains: Mapping[str, Hops]) -> dict[str, Asked]:
    """Greedy rollouts of the one test below a run folder, by question id.

    Raises:
        SystemExit: no test, or several.
    """
    found = sorted(run.glob("test/*/trajectories.jsonl"))
    if len(found) != 1:
        sys.exit(f"{run}: expected one test with its trajectories.jsonl, found {len(found)}.")
    asked = {}
    for record in read_trajectories(found[0]):
        identity = record["question"]["id"]
        if record["rollout_index"] == 0 and record["phase"] == "test":
            texts = [passage["contents"] for passages in record["passages"] for passage in passages]
            chain = chains[identity]
            is_found = all(is_stated(texts, subject, object_) for _, subject, object_ in chain)
            asked[identity] = Asked(len(chain), record["reward"] == 1, is_found, len(record["queries"]))
    return asked


def is_stated(texts: Iterable[str], subject: str, found: str) -> bool:
    """Whether a passage names both."""
    return any(subject in text and found.lower() in text.lower() for text in texts)


def table(runs: Mapping[str, Mapping[str, Asked]]) -> Iterator[str]:
    """The table as lines of Markdown: each run by hops, then all its questions."""
    yield from header(COLUMNS)
    first = next(iter(runs.values()))
    for name, asked in runs.items():
        for hops in (1, 2, 3, None):
            kept = {identity: one for identity, one in asked.items() if hops in (None, one.hops)}
            if kept:
                yield row([name, "all" if hops is None else str(hops), *cells(kept, None if asked is first else first)])


def cells(asked: Mapping[str, Asked], first: Mapping[str, Asked] | None) -> list[str]:
    """Of one run and one number of hops, from the number of questions on."""
    found = [one.is_right for one in asked.values() if one.is_found]
    difference = None if first is None else paired_over_groups(rights(asked), rights(first))
    return [
        str(len(asked)),
        shown(mean_over_groups(rights(asked))),
        "" if difference is None else shown(difference, "+"),
        f"{fmean(one.searches for one in asked.values()):.2f}",
        f"{len(found) / len(asked):.3f}",
        f"{fmean(found):.3f}" if found else "",
    ]


def rights(asked: Mapping[str, Asked]) -> Values:
    """One number for each question, in the keys that the statistics take."""
    return {((0, int(identity.rpartition("_")[2])), 0): float(one.is_right) for identity, one in asked.items()}


def shown(estimate: Estimate | None, sign: str = "") -> str:
    """A mean and its interval."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return "" if estimate is None else f"{estimate.mean:{sign}.3f}"
    return f"{estimate.mean:{sign}.3f} [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"


def main(argv: Sequence[str]) -> int:
    """Prints the table; returns the exit code."""
    if len(argv) < 2:
        sys.exit(__doc__)
    chains = read_hops(Path(argv[0]))
    print("\n".join(table({Path(run).name: read_asked(Path(run), chains) for run in argv[1:]})))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
