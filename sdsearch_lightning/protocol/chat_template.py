"""Chat templates are programs of whoever made the model: they run in jinja2's sandbox, and within bounds.

transformers renders them in an ImmutableSandboxedEnvironment, on plain values. What a sandbox does not bound is bounded
here: the template's length, how long it may run, and how much it may write around what it is given.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sdsearch_lightning.errors import ConfigError, reading_foreign

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TEMPLATE, MAX_ADDED = 1 << 18, 1 << 18
"""Characters of a template, and those that it may add to the turns; known ones have up to 20,000 and add 2,000."""
MAX_SECONDS = 3.0
"""For one rendering, which takes less than a millisecond."""


class OutOfBoundsError(ConfigError):
    """A chat template that is too long, runs too long or writes too much."""


class _LateError(Exception):
    """A rendering that takes too long."""


def render_chat(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Mapping[str, str | None]], **options: Any) -> str:
    """The turns as text, by the chat template of the tokenizer.

    Raises:
        OutOfBoundsError: see there.
        ConfigError: the template wants other turns, or is broken.
    """
    if (length := len(str(tokenizer.chat_template))) > MAX_TEMPLATE:
        raise _refused(f"at most {MAX_TEMPLATE} characters, found {length}")
    try:
        with reading_foreign("the tokenizer's chat template cannot be rendered"), _limited(MAX_SECONDS):
            text = str(tokenizer.apply_chat_template(list(turns), **options | {"tokenize": False}))
    except ConfigError as error:
        if isinstance(error.__cause__, (_LateError, MemoryError)):
            raise _refused(f"one that ends within {MAX_SECONDS:g} s and memory, found one that does not") from error
        raise
    if (added := len(text) - sum(len(turn["content"] or "") for turn in turns)) > MAX_ADDED:
        raise _refused(f"one that adds at most {MAX_ADDED} characters to what was said, found {added}")
    return text


def _refused(what: str) -> OutOfBoundsError:
    return OutOfBoundsError(
        f"the tokenizer's chat template: expected {what}. Look into the model's folder (chat_template.jinja), or take "
        "another model."
    )


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raises `_LateError` in the block when time is up; in the main thread, the only one that signals reach.

    A timer and a handler that were there before are there again after it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: object) -> None:
        raise _LateError

    handler = signal.signal(signal.SIGALRM, ring)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)
