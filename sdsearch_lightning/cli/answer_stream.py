"""An answer in the terminal while it comes: a line per thought, query and passage, token by token.

Tags become labels. All text is a model's or a corpus's: control characters are spaces before a terminal sees them, and
nothing is read as markup.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from sdsearch_lightning.errors import RetrievalError
from sdsearch_lightning.inference.asker import Answer
from sdsearch_lightning.protocol.conversation import Continue
from sdsearch_lightning.protocol.heard import Event, Found, Wrote
from sdsearch_lightning.report.console import OBSERVATION_LENGTH, STYLES
from sdsearch_lightning.report.example import LABELS, harmless, printable
from sdsearch_lightning.types import Passage

UNTAGGED = "write"
"""Label of what the policy writes outside of its tags."""
_STYLE_OF = {label: STYLES[kind] for kind, label in LABELS.items()}
_WIDTH = len("rests on") + 2


class AnswerStream:
    """Shows the events of one rollout; call it with each.

    Args:
        console: where to write.
        tags: of the protocol.
    """

    def __init__(self, console: Console, tags: Sequence[str]) -> None:
        self._console, self._tags = console, tuple(tags)
        self._tag = re.compile("|".join(map(re.escape, tags)))
        self._held = ""  # may be the beginning of a tag
        self._label = UNTAGGED
        self._is_line = self._is_gap = False
        self._num_passages = 0

    def ask(self, question: str) -> None:
        """Repeat a question that nobody saw being typed."""
        self._line("", "")
        self._line("question", question, "bold")

    def __call__(self, event: Event) -> None:
        """Show one event of the rollout."""
        if isinstance(event, Wrote):
            self._write(event.text)
            return
        self._text(self._held)
        self._held = ""
        self._end_line()
        self._label = UNTAGGED
        if isinstance(event, Found):
            self._found(event.result)
        elif isinstance(event, Continue):
            self._line("", "no action: the model is told so and tries again", "dim")

    def _write(self, text: str) -> None:
        self._held += text
        while found := self._tag.search(self._held):
            self._text(self._held[: found.start()])
            self._end_line()
            self._held = self._held[found.end() :]
            self._label = UNTAGGED if found[0].startswith("</") else found[0][1:-1]
        keep = next((n for n in range(len(self._held), 0, -1) if self._begins_tag(self._held[-n:])), 0)
        shown = len(self._held) - keep
        self._text(self._held[:shown])
        self._held = self._held[shown:]

    def _begins_tag(self, text: str) -> bool:
        return any(tag.startswith(text) for tag in self._tags)

    def _text(self, text: str) -> None:
        """Continue the line with text, white space as single spaces."""
        words = printable(text)
        if not words:
            self._is_gap |= bool(text)
            return
        if not self._is_line:
            self._console.print(Text(f"{self._label:<{_WIDTH}}", "dim"), end="")
        elif self._is_gap or not harmless(text[0]).strip():
            words = f" {words}"
        self._console.print(Text(words, _STYLE_OF.get(self._label, "")), end="", soft_wrap=True)
        self._is_line, self._is_gap = True, not harmless(text[-1]).strip()

    def _end_line(self) -> None:
        if self._is_line:
            self._console.print()
        self._is_line = self._is_gap = False

    def _line(self, label: str, text: str, style: str = "") -> None:
        """A whole line; without label and text an empty one."""
        shown = Text(f"{label:<{_WIDTH}}" if text else "", "dim").append(printable(text), f"not dim {style}")
        self._console.print(shown, soft_wrap=True)

    def _found(self, result: Sequence[Passage] | RetrievalError) -> None:
        if isinstance(result, RetrievalError):
            self._line("failed", str(result), "red")
            return
        for passage in result:
            self._num_passages += 1
            self._line("read", f"[{self._num_passages}] {_clipped(passage)}", STYLES["OBSERVATION"])
        if not result:
            self._line("read", "nothing found", "dim")

    def finish(self, answer: Answer) -> None:
        """Tell what the answer rests on, or why there is none."""
        if answer.answer is None:
            self._line("", f"no answer: {str(answer.stop_reason).lower().replace('_', ' ')}", "red")
        else:
            numbered = enumerate((passage for found in answer.passages for passage in found), start=1)
            resting = {_clipped(p): f"[{number}] {_clipped(p)}" for number, p in numbered if answer.rests_on(p)}
            for line in resting.values():
                self._line("rests on", line)
            if not resting:
                self._line("rests on", "nothing: no passage that was found holds these words", "yellow")
        if answer.has_unknown_words:
            self._line("note", "the model's vocabulary lacks some words of the question", "yellow")


def _clipped(passage: Passage) -> str:
    text = printable(passage.contents)
    return text if len(text) <= OBSERVATION_LENGTH else f"{text[:OBSERVATION_LENGTH].rstrip()} ..."
