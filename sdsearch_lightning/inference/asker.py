"""Asker: questions in, answers out, by the rollout that the model was trained to make.

The engine, the protocol and the limits are those of training; decoding is greedy unless a temperature is given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from lightning.pytorch.cli import LightningArgumentParser

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.inference.opening import open_origin
from sdsearch_lightning.inference.origin import Origin, find_origin
from sdsearch_lightning.protocol.heard import Listen
from sdsearch_lightning.retrieval import Retriever
from sdsearch_lightning.scoring.rewards import holds_gold
from sdsearch_lightning.types import Passage, Question, StopReason, Trajectory


@dataclass(frozen=True)
class Answer:
    """What came of one question."""

    question: str
    answer: str | None
    """None where the rollout ended without one; `stop_reason` says how."""
    queries: tuple[str, ...]
    passages: tuple[tuple[Passage, ...], ...]
    """What each query found, best first."""
    stop_reason: StopReason
    trajectory: Trajectory
    """The rollout, token by token."""
    error: str | None = None
    """Why a search failed, where one did."""
    has_unknown_words: bool = False
    """Whether the model's vocabulary lacks some words of the question."""

    def rests_on(self, passage: Passage) -> bool:
        """Whether a passage holds the answer, by the words of both."""
        return self.answer is not None and holds_gold([self.answer], [passage.contents])

    def to_dict(self) -> dict[str, Any]:
        """The answer as JSON has it: question, answer, queries, passages, stop_reason, error."""
        return {
            "question": self.question,
            "answer": self.answer,
            "queries": list(self.queries),
            "passages": [[self._passage(passage) for passage in found] for found in self.passages],
            "stop_reason": str(self.stop_reason),
            "error": self.error,
        }

    def _passage(self, passage: Passage) -> dict[str, Any]:
        score = float(passage.score)
        return {
            "id": passage.id,
            "title": passage.title,
            "contents": passage.contents,
            "score": score if math.isfinite(score) else None,  # JSON has no infinity
            "holds_answer": self.rests_on(passage),
        }


class Asker:
    """Answers questions with a trained model and the retriever it was trained with.

        asker = Asker(run="runs/quickstart")
        asker("question e243 the rel8 the rel5 ?").answer

    Keep it: making one loads the model. Give it several questions at once, and they decode together.

    Args:
        run: a run folder, or its name below runs/.
        model: a Hugging Face folder or hub name, or the folder of an adapter, in place of a run.
        config: a configuration file or several, whose keys are added to those of the run or model.
        ckpt_path: a checkpoint of the run, or `last`; None: the run's model, or its last checkpoint where it has none.
        retriever: what to search with, an object with `search(queries, k)`; None: that of the configuration.
        temperature: of sampling; 0 is greedy.
        seed: of sampling.
        device: where the model runs; None: a GPU where there is one.
        overrides: dotted keys of model, data and rollout, such as {"rollout.max_searches": 2}.

    Raises:
        ConfigError: what was named cannot answer, see `find_origin`; the retriever breaks its contract.
    """

    def __init__(
        self,
        *,
        run: str | Path | None = None,
        model: str | Path | None = None,
        config: str | Path | Sequence[str | Path] = (),
        ckpt_path: str | Path | None = None,
        retriever: Any = None,
        temperature: float = 0.0,
        seed: int = 0,
        device: str | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        given = [*(overrides or {}), *(["data.retriever"] if retriever is not None else [])]
        files = [config] if isinstance(config, str | Path) else config
        origin = find_origin(
            None if run is None else str(run),
            None if model is None else str(model),
            [str(path) for path in files],
            None if ckpt_path is None else str(ckpt_path),
            given,
        )
        keys = [f"--{key}={value}" for key, value in (overrides or {}).items()]
        self._open(origin, keys, LightningArgumentParser, retriever, temperature, seed, device)

    @classmethod
    def of(
        cls,
        origin: Origin,
        keys: Sequence[str] = (),
        parser_class: type[LightningArgumentParser] = LightningArgumentParser,
        temperature: float = 0.0,
        seed: int = 0,
        device: str | None = None,
    ) -> Asker:
        """The same from an origin and keys as a command line has them; see `build_for_answers`."""
        asker = cls.__new__(cls)
        asker._open(origin, keys, parser_class, None, temperature, seed, device)
        return asker

    def _open(
        self,
        origin: Origin,
        keys: Sequence[str],
        parser_class: type[LightningArgumentParser],
        retriever: Any,
        temperature: float,
        seed: int,
        device: str | None,
    ) -> None:
        if temperature < 0:
            raise ConfigError(f"temperature: expected 0 (greedy) or more, found {temperature}.")
        opened = open_origin(origin, keys, parser_class, retriever, temperature, seed, device)
        self._opened, self._sampler = opened, opened.sampler
        self.retriever: Retriever = opened.retriever

    @property
    def tags(self) -> tuple[str, ...]:
        """Tags of the protocol, in which the policy writes."""
        return self._sampler.protocol.tags

    @property
    def max_searches(self) -> int:
        """Searches that an answer may take."""
        return self._sampler.limits.max_searches

    @overload
    def __call__(self, question: str, listen: Listen | None = None) -> Answer: ...

    @overload
    def __call__(self, question: list[str], listen: Listen | None = None) -> list[Answer]: ...

    def __call__(self, question: str | list[str], listen: Listen | None = None) -> Answer | list[Answer]:
        """The answer to a question, or to each of several.

        Args:
            question: one, or a list of them.
            listen: called with each piece of text, search and passage as it comes; for one question. See
                `sdsearch_lightning.protocol.heard`.

        Raises:
            ConfigError: a question is empty.
        """
        if isinstance(question, str):
            return self._answers([question], listen)[0]
        return self._answers(question, None)

    def _answers(self, texts: list[str], listen: Listen | None) -> list[Answer]:
        if empty := [index for index, text in enumerate(texts) if not text.strip()]:
            raise ConfigError(f"question: expected some text, found none (at index {empty[0]} of {len(texts)}).")
        questions = [Question(str(index), text, ()) for index, text in enumerate(texts)]
        ids = [(0, index) for index in range(len(texts))]
        requests = self._sampler.requests(questions, ids, 1, "ask")
        window = self._sampler.run(requests, listen=listen)
        error = window.searches.last_error or None
        unknown = self._sampler.codec.tokenizer.unk_token_id
        return [
            Answer(
                t.question.text,
                t.answer,
                t.queries,
                t.passages,
                t.stop_reason,
                t,
                error if t.stop_reason.is_error else None,
                unknown is not None and unknown in request.prompt_ids,
            )
            for t, request in zip(window.trajectories, requests, strict=True)
        ]

    def close(self) -> None:
        """Stop the search worker, and let the retriever give back what it holds."""
        self._opened.close()

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
