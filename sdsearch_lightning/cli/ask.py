"""`sdsearch ask`: a question to a trained model, answered while one looks on; without a question, one after the other.

Standard output holds the answer alone, with `--json` one object a question; what is told beside it goes to standard
error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, redirect_stdout, suppress
from typing import Any, TextIO

from sdsearch_lightning.cli.answer_stream import AnswerStream
from sdsearch_lightning.cli.run_parser import RunParser
from sdsearch_lightning.errors import RetrievalError
from sdsearch_lightning.inference.asker import Asker
from sdsearch_lightning.inference.origin import Origin
from sdsearch_lightning.report.console import make_console
from sdsearch_lightning.report.example import printable
from sdsearch_lightning.runs.threads import use_threads


def answer_all(options: Any, origin: Origin, keys: Sequence[str]) -> None:
    """Answer the question of a command line, or those of standard input.

    Args:
        options: of `ask_parser`.
        origin: what answers.
        keys: those of `fit`.

    Raises:
        RetrievalError: the search of a single question failed.
    """
    use_threads(origin.num_threads)
    with redirect_stdout(sys.stderr):  # of libraries and of users' classes
        asker = Asker.of(origin, keys, RunParser, options.temperature, options.seed, options.device)
    out = sys.stdout
    with closing(asker):
        if not options.json:
            _tell_origin(asker, origin, options.temperature)
        for question in _questions(options.question, out, options.json):
            if options.json:
                with redirect_stdout(sys.stderr):
                    answer = asker(question)
                # ASCII: no character of a model or a corpus drives a terminal.
                print(json.dumps(answer.to_dict()), file=out, flush=True)
            else:
                stream = AnswerStream(make_console(), asker.tags)
                if options.question is None and not sys.stdin.isatty():
                    stream.ask(question)
                answer = asker(question, listen=stream)
                stream.finish(answer)
            if options.question is not None and answer.error is not None:
                raise RetrievalError(answer.error)


def _tell_origin(asker: Asker, origin: Origin, temperature: float) -> None:
    decoding = "greedy" if temperature == 0 else f"sampled at temperature {temperature:g}"
    told = f"{origin.weights}; {type(asker.retriever).__name__}; {decoding}, at most {asker.max_searches} searches"
    print(printable(told), file=sys.stderr)


def _questions(given: str | None, out: TextIO, is_json: bool) -> Iterator[str]:
    """The one that was given, or lines of standard input up to its end; Ctrl-C ends the command."""
    if given is not None:
        yield given
        return
    is_asked = sys.stdin.isatty()
    if is_asked:
        with suppress(ImportError):
            import readline  # noqa: F401  (lines can be edited and called back)

        print("ask a question; Ctrl-D leaves", file=sys.stderr)
    while True:
        try:
            if is_asked and not is_json and out.isatty():
                line = input("\n? ")
            else:
                line = sys.stdin.readline()
                if not line:
                    return
        except EOFError:
            print(file=out)
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
            raise
        if line.strip():
            yield line.strip()
