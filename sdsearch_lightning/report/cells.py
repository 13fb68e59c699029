"""Views of rollouts as text for a terminal: the map of a group, a sibling, a token; colours add to what is written.

Everything is `Text`, which reads no markup; views hold no control characters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sdsearch_lightning.report.example import LABELS
from sdsearch_lightning.report.views import UNRELIABLE, View

SIBLING_LENGTH, NUMBER_LENGTH, SHORTEST_QUERY, LONGEST_QUERY, ANSWER_LENGTH = 12, 7, 4, 24, 18
PASSAGE_LENGTH = 300
"""Characters of a passage or a thought that are shown unless all is asked for."""
AGREE, DIFFER, NEUTRAL = (42, 120, 214), (206, 56, 56), (130, 87, 201)
STYLES = {"REASONING": "dim", "QUERY": "bold", "OBSERVATION": "dim", "REFINE": "italic"}
BAR = 14
"""Columns of a probability of 1."""


class Measure(NamedTuple):
    """A number of a query: its key in the view, how it is called, the value of full colour."""

    key: str
    label: str
    reach: float
    is_signed: bool = True


MEASURES = (
    Measure("verdict", "teacher - student, nats per token", 1.0),
    Measure("mean_jsd", "JSD, nats per token", math.log(2) / 2, is_signed=False),
    Measure("credit", "own credit, standard deviations", 2.0),
)
Place = tuple[int, int]
"""A token of a rollout: which query of it, and which token of that, from 0."""


def queries(rollout: View) -> list[View]:
    """The rows of a rollout that are queries."""
    return [row for row in rollout["rows"] if "query" in row]


def measures(group: View) -> list[Measure]:
    """Those that some query of the group has."""
    found = [row["query"] for rollout in group["rollouts"] for row in queries(rollout)]
    return [measure for measure in MEASURES if any(query.get(measure.key) is not None for query in found)]


def places(rollout: View) -> list[Place]:
    """Every token that can be chosen, in reading order."""
    return [
        (number, token)
        for number, row in enumerate(queries(rollout))
        for token in range(len(row["query"].get("tokens", ())))
    ]


def entry(group: View, *, with_step: bool) -> Text:
    """A group in a list: its step, how each sibling ended, the question."""
    text = Text(f"{group['step']:>4} " if with_step else "")
    for rollout in group["rollouts"]:
        text.append("●" if rollout["right"] else "○", "green" if rollout["right"] else "red")
    return text.append(f" {group['question']}")


def group_map(group: View, chosen: int, measure: Measure | None, width: int) -> Table:
    """A row per sibling, a column per search.

    Args:
        group: the view.
        chosen: index of the sibling that is marked.
        measure: the number that stands before each query; None: none.
        width: columns of the terminal that there are; queries are cut to fit where they can.
    """
    most = max((len(queries(rollout)) for rollout in group["rollouts"]), default=0)
    left = (width - SIBLING_LENGTH - ANSWER_LENGTH) // max(most, 1) - (NUMBER_LENGTH + 2 if measure else 1)
    length = min(LONGEST_QUERY, left if left >= SHORTEST_QUERY else 0 if measure else SHORTEST_QUERY)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("  sibling", no_wrap=True, min_width=SIBLING_LENGTH)
    for name in (*(f"search {index + 1}" for index in range(most)), "answer"):
        table.add_column(name, no_wrap=True, min_width=NUMBER_LENGTH)
    for index, rollout in enumerate(group["rollouts"]):
        cells = [_cell(row, measure, length) for row in queries(rollout)]
        cells += [Text()] * (most - len(cells))
        answers = [row["text"] for row in rollout["rows"] if row["kind"] == "ANSWER"]
        answer = Text(_cut(answers[-1] if answers else rollout["verdict"], ANSWER_LENGTH))
        table.add_row(Text("▸ " if index == chosen else "  ").append_text(_sibling(rollout)), *cells, answer)
    return table


def _sibling(rollout: View) -> Text:
    style = "green" if rollout["right"] else "red"
    text = Text().append("✓ " if rollout["right"] else "✗ ", style).append(name_of(rollout))
    return text if rollout.get("advantage") is None else text.append(f" {rollout['advantage']:+.2f}", "dim")


def name_of(rollout: View) -> str:
    """`2`, `greedy` or `sampled 2`."""
    decoding = rollout.get("decoding", "")
    return decoding if decoding == "greedy" else f"{decoding} {rollout['index'] + 1}".strip()


def _cell(row: View, measure: Measure | None, length: int) -> Text:
    words = _cut(row["text"], length) if length else ""
    value = None if measure is None else row["query"].get(measure.key)
    if measure is None or value is None:
        return Text(words)
    is_doubtful = measure.key == "verdict" and row["query"].get("doubtful", False)
    shown = f"{value:+.2f}" if measure.is_signed else f"{value:.3f}"
    style = "dim" if is_doubtful else _background(value / measure.reach, is_signed=measure.is_signed)
    return Text().append(f" {shown}{'?' if is_doubtful else ' '}", style).append(f" {words}" if words else "")


def _background(share: float, *, is_signed: bool = True) -> str:
    """White on a hue by the sign, the darker the smaller `share` is; it is 1 at full strength."""
    hue = NEUTRAL if not is_signed else AGREE if share >= 0 else DIFFER
    strength = 0.25 + 0.75 * min(1.0, abs(share)) ** 0.5
    return "#ffffff on #" + "".join(f"{round(30 + (part - 30) * strength):02x}" for part in hue)


def transcript(rollout: View, chosen: Place | None, *, is_whole: bool = False) -> RenderableType:
    """The rows of a rollout; below the query of the chosen token stands what was said of that."""
    parts: list[RenderableType] = []
    number = -1
    for row in rollout["rows"]:
        number += "query" in row
        style = STYLES.get(row["kind"], "")
        if row["kind"] == "ANSWER":
            style = "bold green" if rollout["right"] else "bold red"
        text = row["text"] if is_whole or row["kind"] == "QUERY" else _cut(row["text"], PASSAGE_LENGTH)
        token = chosen[1] if "query" in row and chosen is not None and chosen[0] == number else None
        shown = _tokens(row["query"], token) if "tokens" in row.get("query", ()) else Text(text, style)
        parts.append(_labelled(LABELS.get(row["kind"], ""), shown))
        if "query" in row and (told := _numbers(row["query"])):
            parts.append(_labelled("", Text(told, "dim")))
        if token is not None:
            parts.append(_labelled("", detail(row["query"], token)))
    return Group(*parts)


def _labelled(label: str, shown: Text) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
    grid.add_column(width=7, style="dim")
    grid.add_column(overflow="fold", ratio=1)
    grid.add_row(Text(label), shown)
    return grid


def _tokens(query: View, chosen: int | None) -> Text:
    text = Text()
    for index, token in enumerate(query["tokens"]):
        student, teacher = query["student"][index], query["teacher"][index]
        if index in query.get("unreliable", ()):
            style = "dim strike"
        elif student is None or teacher is None:
            style = _background(-1.0)
        else:
            style = _background((teacher - student) / 2)
        blanks = len(token) - len(token.lstrip())
        text.append(token[:blanks]).append(token[blanks:], f"{style} {'bold underline' if index == chosen else ''}")
    return text


def _numbers(query: View) -> str:
    told = []
    if query.get("verdict") is not None:
        told.append(f"teacher - student {query['verdict']:+.2f}")
    if query.get("mean_jsd") is not None:
        told.append(f"JSD {query['mean_jsd']:.3f}")
    if query.get("credit") is not None:
        told.append(f"own credit {query['credit']:+.2f}")
    if query.get("value") is not None:
        told.append(f"value {query['value']:.2f}")
    if "unreliable" in query:
        told.append(f"{len(query['unreliable'])} of {len(query['tokens'])} tokens unreliable")
    if "outside" in query:
        told.append(f"{query['outside']} outside the teacher's top-k")
    return ", ".join(told)


def detail(query: View, index: int) -> Text:
    """What student and teacher said of one token."""
    student, teacher, jsd = (query[key][index] for key in ("student", "teacher", "jsd"))
    token = query["tokens"][index].strip()
    text = Text().append(f"{token}\n", "bold")
    if index in query.get("unreliable", ()):
        text.append(f"unreliable: both give it less than {UNRELIABLE:.0%}\n", "yellow")
    for name, logprob in (("student", student), ("teacher", teacher)):
        told = "outside the teacher's top-k" if logprob is None else _bar(math.exp(logprob))
        text.append(f"{name:<12}{told}\n")
    difference = "" if student is None or teacher is None else f"teacher - student {teacher - student:+.2f} nats, "
    text.append(f"{difference}JSD {'-' if jsd is None else format(jsd, '.3f')} nats\n")
    text.append("the teacher's first choices\n", "dim")
    for choice, share in query["top"][index]:
        written = choice.strip() == token
        text.append(f"{_cut(choice.strip(), 11):<12}{_bar(share or 0.0)}\n", "bold" if written else "dim")
    text.rstrip()
    return text


def _bar(share: float) -> str:
    return f"{'█' * round(BAR * min(share, 1.0)):<{BAR}} {share:7.2%}"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def left_out(parts: Sequence[tuple[int, int]]) -> str:
    """`, 12 of 40 groups` where some are left out, else nothing; `parts` are shown and all of each phase."""
    shown, every = (sum(numbers) for numbers in zip(*parts, strict=True)) if parts else (0, 0)
    return "" if shown == every else f", {shown:,} of {every:,} groups"
