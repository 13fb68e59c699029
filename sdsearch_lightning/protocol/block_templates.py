"""The literal text of everything a teacher may read behind the question: one template per kind of block.

Text from outside (queries, passages, answers, whole rollouts) is neutralized here, so that no block brings a tag or a
special token of its own: see `TokenCodec.neutralize`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.types import Label, SiblingRecord

_FIELDS = {
    "entry": ("number", "label"),
    "unlabelled_entry": ("number",),
    "query": ("number", "query", "label"),
    "judged_query": ("number", "query", "label"),
    "no_query": ("number", "label"),
    "rollout": ("number", "label", "rollout"),
    "documents": ("documents",),
    "solution_step": ("number", "query", "documents"),
    "solution": ("steps", "answer"),
    "gold_answer": ("answer",),
}


@dataclass(frozen=True)
class BlockTemplates:
    """Texts of the hindsight block and of what takes its place; numbers count from 1. The paper does not print its own.

    A block stands after the prompt inside the user turn, so that student and teacher share their whole suffix.
    """

    header: str = "\nSearch queries and outcomes of several attempts at this question:\n"
    """First line over siblings' queries; the same without labels, so that nothing but the labels goes."""
    entry: str = "[Rollout {number} | {label}]\n"
    """Opens one sibling's entry; fields number, label."""
    unlabelled_entry: str = "[Rollout {number}]\n"
    """Opens an entry that tells no outcome; field number."""
    query: str = "search {number}: {query}\n"
    """One query of an entry; fields number, query, label (empty in an entry that tells no outcome)."""
    judged_query: str = "search {number} | {label}: {query}\n"
    """One query that has an outcome of its own, below an entry that tells none; fields number, query, label."""
    no_query: str = "(no search)\n"
    """Stands for the queries of a sibling that never searched; fields as entry."""
    rollouts_header: str = "\nSeveral attempts at this question and their outcomes:\n"
    """First line over whole rollouts."""
    rollout: str = "[Rollout {number} | {label}]\n{rollout}\n"
    """One whole rollout; fields number, label, rollout."""
    documents: str = "\nDocuments that the next search returns:\n{documents}\n"
    """What a query returned; field documents, written with the protocol's passage_template."""
    solution_step: str = "search {number}: {query}\n{documents}\n"
    """One search of a sibling's solution; fields number, query, documents."""
    solution: str = "\nCorrect solution:\n\n{steps}answer: {answer}\n\nCorrectly solve the original question.\n"
    """A sibling's solution; fields steps, answer. The words around it are SDPO's (arXiv:2601.20802)."""
    gold_answer: str = "\nThe correct answer is: {answer}\n"
    """The gold answer as a hint; field answer."""

    def __post_init__(self) -> None:
        for name, fields in _FIELDS.items():
            check_fields(f"block.{name}", getattr(self, name), *fields)

    def write_siblings(self, codec: TokenCodec, entries: Sequence[SiblingRecord]) -> str:
        """The hindsight block h(G) of the paper; "" without entries."""
        lines = [self.header] if entries else []
        for number, entry in enumerate(entries, start=1):
            label = str(entry.label or "")
            lines.append((self.entry if entry.label else self.unlabelled_entry).format(number=number, label=label))
            lines += [
                self.query.format(number=n, query=codec.neutralize(query), label=label)
                for n, query in enumerate(entry.queries, start=1)
            ] or [self.no_query.format(number=number, label=label)]
        return "".join(lines)

    def write_judged_queries(
        self, codec: TokenCodec, entries: Sequence[tuple[SiblingRecord, Sequence[Label | None]]]
    ) -> str:
        """Siblings' queries, each with its own outcome; "" without entries.

        Args:
            codec: tells control strings.
            entries: each sibling, and an outcome for each of its queries.
        """
        lines = [self.header] if entries else []
        for number, (entry, labels) in enumerate(entries, start=1):
            lines.append(self.unlabelled_entry.format(number=number))
            lines += [
                self.judged_query.format(number=n, query=codec.neutralize(query), label=str(label or ""))
                for n, (query, label) in enumerate(zip(entry.queries, labels, strict=True), start=1)
            ] or [self.no_query.format(number=number, label="")]
        return "".join(lines)

    def write_rollouts(self, codec: TokenCodec, rollouts: Sequence[tuple[str, Label | None]]) -> str:
        """Whole rollouts with their outcomes; "" without any.

        Args:
            codec: tells control strings.
            rollouts: text and outcome of each; tags in the text are data here.
        """
        lines = [self.rollouts_header] if rollouts else []
        lines += [
            self.rollout.format(number=number, label=str(label or ""), rollout=codec.neutralize(text))
            for number, (text, label) in enumerate(rollouts, start=1)
        ]
        return "".join(lines)

    def write_documents(self, codec: TokenCodec, passages_text: str) -> str:
        """What one query returned, as `Protocol.format_passages` writes it."""
        return self.documents.format(documents=codec.neutralize(passages_text))

    def write_solution(self, codec: TokenCodec, searches: Iterable[tuple[str, str]], answer: str) -> str:
        """The searches of a rollout, (query, text of its passages) each, and its answer."""
        steps = (
            self.solution_step.format(number=n, query=codec.neutralize(query), documents=codec.neutralize(passages))
            for n, (query, passages) in enumerate(searches, start=1)
        )
        return self.solution.format(steps="".join(steps), answer=codec.neutralize(answer))

    def write_gold_answer(self, codec: TokenCodec, answer: str) -> str:
        """A hint that tells the gold answer."""
        return self.gold_answer.format(answer=codec.neutralize(answer))


def check_fields(name: str, template: str, *fields: str) -> None:
    """Refuse a template of the protocol that asks for other fields than it is given.

    Raises:
        ConfigError: an unknown field, or braces that do not pair.
    """
    try:
        template.format(**{field: 1 if field in ("index", "number") else "" for field in fields})
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(
            f"model.protocol.{name}: expected a template with fields {', '.join(fields)}, found {template!r} "
            f"({type(error).__name__}: {error}). Write {{{{ and }}}} for plain braces."
        ) from error
