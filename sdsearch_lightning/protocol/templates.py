"""The literal text of a search rollout: prompt, tags, observations.

`Protocol` holds every string that stands around the policy's own words; `SearchR1Protocol` and `AutoRefineProtocol` are
two sets of values, and each value is a YAML key. Sources: Search-R1 (arXiv:2503.09516), AutoRefine (arXiv:2505.11277).
What the teacher reads behind the prompt is worded in block_templates.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.protocol.block_templates import BlockTemplates, check_fields
from sdsearch_lightning.protocol.chat_template import render_chat
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.protocol.turn_text import written_turn
from sdsearch_lightning.types import Demonstration, Limits, Passage, Pluggable, SiblingRecord, Span, SpanKind

SEARCH_R1_PROMPT = (
    "Answer the given question. You must conduct reasoning inside <think> and </think> first every time you get new "
    "information. After reasoning, if you find you lack some knowledge, you can call a search engine by <search> query "
    "</search> and it will return the top searched results between <information> and </information>. You can search as "
    "many times as your want. If you find no further external knowledge needed, you can directly provide the answer "
    "inside <answer> and </answer>, without detailed illustrations. For example, <answer> Beijing </answer>. "
    "Question: {question}\n"
)
AUTOREFINE_PROMPT = (
    "You are a helpful assistant excel at answering questions with multi-turn search engine calling. To answer "
    "questions, you must first reason through the available information using <think> and </think>. If you identify "
    "missing knowledge, you may issue a search request using <search> query </search> at any time. The retrieval "
    "system will provide you with the three most relevant documents enclosed in <documents> and </documents>. After "
    "each search, you need to summarize and refine the existing documents in <refine> and </refine>. You may send "
    "multiple search requests if needed. Once you have sufficient information, provide a concise final answer using "
    "<answer> and </answer>. For example, <answer> Donald Trump </answer>. Question: {question}\n"
)
INVALID_ACTION = (
    "\nMy previous action is invalid. If I want to search, I should put the query between <search> and </search>. "
    "If I want to give the final answer, I should put the answer between <answer> and </answer>. Let me try again.\n"
)


class Protocol(Pluggable):
    """Every literal text of a rollout. Text from outside never brings a tag of its own (`TokenCodec.neutralize`).

    Args:
        prompt: holds `{question}`. Becomes one user turn where the tokenizer has a chat template.
        documents_tag: tag around retrieved passages.
        passage_template: one passage; fields index (from 1), title, text, contents. Passages are joined, then stripped.
        observation_template: holds `{passages}`, its tags around them.
        invalid_message: what the environment answers to an invalid action.
        refine: whether the policy also has a refine tag.
        question_mark: append `?` to a question that does not end with one (as Search-R1's data scripts do).
        use_chat_template: write the prompt as a chat; null: where the tokenizer has one.
        system: what the system turn of the chat says; null leaves it to the template, which may have a default.
        chat_template_kwargs: options of the template, such as enable_thinking.
        add_bos: begin a prompt without a chat template with the tokenizer's beginning-of-text token; null means: where
            the tokenizer itself does. Search-R1 does not.
        block: texts of the hindsight block.
        think_tag: name of the tag around reasoning.
        search_tag: name of the tag around a search.
        answer_tag: name of the tag around the answer.
    """

    required, optional = ("prompt_ids", "render_block"), ("block", "actions", "query_in")

    actions: tuple[tuple[SpanKind, str], ...] = ((SpanKind.QUERY, "search"), (SpanKind.ANSWER, "answer"))
    """The tags that are actions, by what they hold."""

    block: BlockTemplates = BlockTemplates()
    """What a protocol without texts of its own writes where the method itself does not need them."""

    def __init__(
        self,
        prompt: str,
        documents_tag: str = "information",
        passage_template: str = "Doc {index}(Title: {title}) {text}\n",
        observation_template: str | None = None,
        invalid_message: str = INVALID_ACTION,
        refine: bool = False,
        question_mark: bool = True,
        use_chat_template: bool | None = None,
        system: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        add_bos: bool | None = None,
        block: BlockTemplates = BlockTemplates(),  # noqa: B008  (frozen)
        think_tag: str = "think",
        search_tag: str = "search",
        answer_tag: str = "answer",
    ) -> None:
        if "{question}" not in prompt:
            raise ConfigError(f"model.protocol.prompt: expected text that holds {{question}}, found {prompt!r}.")
        self.prompt, self.documents_tag, self.passage_template = prompt, documents_tag, passage_template
        self.observation_template = observation_template or f"\n\n<{documents_tag}>{{passages}}</{documents_tag}>\n\n"
        if self.observation_template.count("{passages}") != 1:
            raise ConfigError(
                "model.protocol.observation_template: expected text that holds {passages} once, "
                f"found {observation_template!r}."
            )
        check_fields("passage_template", passage_template, "index", "title", "text", "contents")
        self.invalid_message, self.question_mark = invalid_message, question_mark
        self.use_chat_template, self.block = use_chat_template, block
        self.system, self.add_bos = system, add_bos
        self.chat_template_kwargs: Mapping[str, Any] = dict(chat_template_kwargs or {})
        self.policy_tags = (think_tag, search_tag, answer_tag, *(("refine",) if refine else ()))
        if len({*self.policy_tags, documents_tag}) <= len(self.policy_tags):
            raise ConfigError(f"model.protocol: expected different tags, found {(*self.policy_tags, documents_tag)}.")
        self.actions = ((SpanKind.QUERY, search_tag), (SpanKind.ANSWER, answer_tag))
        self._turn_tags = dict(self.actions) | {SpanKind.REASONING: think_tag, SpanKind.REFINE: "refine"}

    @property
    def tags(self) -> tuple[str, ...]:
        """Every opening and closing tag, the environment's included."""
        names = (*self.policy_tags, self.documents_tag)
        return tuple(f"<{slash}{name}>" for name in names for slash in ("", "/"))

    def query_in(self, content: str) -> tuple[int, int] | None:
        """Where the query begins and ends in what stands inside a search tag; None where it holds none.

        Only these characters are searched, told to siblings and taught; a protocol whose tag holds more than a query
        (a call in JSON) says which.
        """
        return 0, len(content)

    def user_text(self, codec: TokenCodec, question: str, block: str = "") -> str:
        """What the user turn says: the prompt with the (neutralized) question, then the block."""
        question = codec.neutralize(question.strip())
        if self.question_mark and not question.endswith("?"):
            question += "?"
        return self.prompt.replace("{question}", question) + block

    def prompt_ids(self, codec: TokenCodec, question: str, block: str = "") -> tuple[int, ...]:
        """Token ids of the whole prompt.

        Args:
            codec: tokenizer and control strings.
            question: data from outside.
            block: text of `render_block`; empty for the student.
        """
        text = self.user_text(codec, question, block)
        template = codec.tokenizer.chat_template
        if self.use_chat_template is True and template is None:
            raise ConfigError("model.protocol.use_chat_template is true, but the tokenizer has no chat template.")
        if template is not None and self.use_chat_template is not False:
            turns = [{"role": "system", "content": self.system}] if self.system is not None else []
            turns.append({"role": "user", "content": text})
            options = {**self.chat_template_kwargs, "add_generation_prompt": True}
            return codec.encode_prompt(render_chat(codec.tokenizer, turns, **options))
        if self.system is not None:
            raise ConfigError("model.protocol.system: expected a tokenizer with a chat template, found one without.")
        return (*self._bos_ids(codec), *codec.encode_prompt(text))

    def _bos_ids(self, codec: TokenCodec) -> tuple[int, ...]:
        """What begins a prompt without a chat template."""
        if self.add_bos is False:
            return ()
        if self.add_bos is None or codec.bos_ids:
            return codec.bos_ids
        if (bos_id := codec.tokenizer.bos_token_id) is None:
            raise ConfigError("model.protocol.add_bos is true, but the tokenizer has no beginning-of-text token.")
        return (int(bos_id),)

    def format_passages(self, passages: Iterable[Passage]) -> str:
        """Passages as one text, without the documents tag: byte for byte what Search-R1 writes, by default."""
        return "".join(self._written(passages)).strip()

    def _written(self, passages: Iterable[Passage]) -> list[str]:
        return [
            self.passage_template.format(index=i, title=p.title, text=p.text, contents=p.contents)
            for i, p in enumerate(passages, start=1)
        ]

    def observation_ids(self, codec: TokenCodec, passages_text: str, max_tokens: int | None = None) -> tuple[int, ...]:
        """Token ids of an observation: the passages, as data, cut to `max_tokens` inside a tag that always closes."""
        return self._tagged(codec, codec.encode_data(passages_text), max_tokens)

    def passage_ids(
        self, codec: TokenCodec, passages: Sequence[Passage], max_tokens: int
    ) -> tuple[tuple[int, ...], int]:
        """Token ids of an observation of at most `max_tokens`, and how many of its passages had to be cut for it.

        Where all do not fit, the longest are cut, each at its own end and to the same length, so that one long passage
        does not push out the others.
        """
        ids = self.observation_ids(codec, self.format_passages(passages))
        if len(ids) <= max_tokens or not passages:
            return ids, 0
        first, *others = self._written(passages)
        texts = [first.lstrip(), *others]
        endings = [codec.encode(text[len(text.rstrip()) :]) for text in texts[:-1]] + [()]
        bodies = [codec.encode_data(text.rstrip()) for text in texts]
        room = max_tokens - len(self._tagged(codec, ())) - sum(map(len, endings))
        share = fair_share([len(body) for body in bodies], room)
        cut = [body[:share] + ending for body, ending in zip(bodies, endings, strict=True)]
        body = tuple(token for part in cut for token in part)
        if any(tag in codec.decode(body) for tag in self.tags):  # of the end of one and the beginning of the next
            return self.observation_ids(codec, self.format_passages(passages), max_tokens), 1
        return self._tagged(codec, body, max_tokens), sum(len(body) > share for body in bodies)

    def _tagged(self, codec: TokenCodec, body: tuple[int, ...], max_tokens: int | None = None) -> tuple[int, ...]:
        head, tail = map(codec.encode, self.observation_template.split("{passages}"))
        room = len(body) if max_tokens is None else max(0, max_tokens - len(head) - len(tail))
        return head + body[:room] + tail

    def render_block(self, codec: TokenCodec, entries: Sequence[SiblingRecord]) -> str:
        """The hindsight block h(G) of the paper as text; "" without entries. Queries are data: they bring no tags."""
        return self.block.write_siblings(codec, entries)

    def demonstration_spans(
        self,
        codec: TokenCodec,
        demonstration: Demonstration,
        max_observation_tokens: int = Limits().max_observation_tokens,
    ) -> tuple[Span, ...]:
        """A written rollout as spans, token for token what a rollout with the same texts and passages would hold.

        No span counts as sampled: nobody drew these tokens; the cold start weighs them by kind.

        Args:
            codec: tokenizer and control strings.
            demonstration: what was written.
            max_observation_tokens: as in `Limits`; an observation that is a text is taken as it stands.
        """
        block = self.render_block(codec, demonstration.siblings)
        spans = [Span(SpanKind.PROMPT, self.prompt_ids(codec, demonstration.question.text, block))]
        for is_observation, elements in groupby(demonstration.turns, lambda turn: turn[0] is SpanKind.OBSERVATION):
            if is_observation:
                spans += [Span(kind, self._shown(codec, content, max_observation_tokens)) for kind, content in elements]
            else:
                parts = [(kind, self._turn_tags[kind], str(text)) for kind, text in elements]
                spans += self._written_spans(codec, parts)
        return tuple(spans)

    def _shown(self, codec: TokenCodec, content: str | tuple[Passage, ...], max_tokens: int) -> tuple[int, ...]:
        if isinstance(content, str):
            return self.observation_ids(codec, content)
        return self.passage_ids(codec, content, max_tokens)[0]

    def _written_spans(self, codec: TokenCodec, parts: Sequence[tuple[SpanKind, str, str]]) -> list[Span]:
        """A turn in one piece; where the tokenizer takes words apart at spaces only, tag by tag, which is the same."""
        if not codec.is_lossless:
            return [
                span
                for kind, tag, text in parts
                for span in (
                    Span(SpanKind.SCAFFOLD, codec.encode(f"<{tag}>")),
                    Span(kind, codec.encode_data(f" {text} ")),
                    Span(SpanKind.SCAFFOLD, codec.encode(f"</{tag}>")),
                )
            ]
        turn, regions = written_turn(codec, parts)
        kinds = turn.kinds(regions, re.compile("|".join(map(re.escape, self.tags))), codec.special_ids)
        runs = groupby(zip(kinds, turn.token_ids, strict=True), key=lambda row: row[0])
        return [Span(kind, tuple(token_id for _, token_id in run)) for kind, run in runs]


class SearchR1Protocol(Protocol):
    """Search-R1's prompt, tags, observation and invalid-action text, byte for byte."""

    def __init__(self, prompt: str = SEARCH_R1_PROMPT, documents_tag: str = "information", **kwargs: object) -> None:
        super().__init__(prompt, documents_tag, **kwargs)  # type: ignore[arg-type]


class AutoRefineProtocol(Protocol):
    """AutoRefine's prompt and tags: documents instead of information, and a refine span after each search."""

    def __init__(
        self, prompt: str = AUTOREFINE_PROMPT, documents_tag: str = "documents", refine: bool = True, **kwargs: object
    ) -> None:
        super().__init__(prompt, documents_tag, refine=refine, **kwargs)  # type: ignore[arg-type]


PROTOCOLS: dict[str, type[Protocol]] = {"search_r1": SearchR1Protocol, "autorefine": AutoRefineProtocol}
"""Short names that `model.protocol` accepts beside a class_path."""


def fair_share(lengths: Sequence[int], room: int) -> int:
    """The largest number of tokens s for which the lengths, each cut to s, fit into `room`; at least 0."""
    left, remaining = max(room, 0), len(lengths)
    for length in sorted(lengths):
        if length * remaining > left:
            return left // remaining
        left, remaining = left - length, remaining - 1
    return max(lengths, default=0)
