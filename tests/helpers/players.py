"""Small, honest stand-ins: tokenizers made in code, a retriever with six passages, players of given turns.

Nothing here decides anything the library decides: tokens go through the real `Conversation`, queries through the real
`SearchPool`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sdsearch_lightning.errors import RetrievalError
from sdsearch_lightning.policy.loading import word_level_tokenizer
from sdsearch_lightning.policy.policy import Policy
from sdsearch_lightning.protocol.conversation import Continue, Conversation, Search
from sdsearch_lightning.protocol.templates import Protocol
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.rollout import Engine
from sdsearch_lightning.types import (
    InstanceId,
    Limits,
    Passage,
    Question,
    RolloutRequest,
    Sampling,
    Span,
    SpanKind,
    StopReason,
    Trajectory,
)

# Tokenizers

EOS, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRADDLING = ("?</", ">\n", " Paris</", "><", "search>", "</answer>", "日", " the")
"""Merges of the BPE tokenizer; most reach across the edge of a tag."""


def byte_tokenizer(*merged: str, pad_token: str = "<|pad|>") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: one token per byte, but for the `merged` texts and their beginnings."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merges: dict[tuple[str, str], None] = {}
    for text in merged:
        ((spelled, _),) = byte_level.pre_tokenize_str(text)
        merges |= {(spelled[:end], spelled[end]): None for end in range(1, len(spelled))}
    pieces = [*sorted(byte_level.alphabet()), *dict.fromkeys("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, list(merges)))
    backend.pre_tokenizer, backend.decoder = byte_level, decoders.ByteLevel()
    specials = {"eos_token": EOS, "pad_token": pad_token, "extra_special_tokens": [IM_START, IM_END]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **specials)


def bpe_tokenizer(pad_token: str = "<|pad|>") -> PreTrainedTokenizerFast:
    """Tokens that reach across tag edges."""
    return byte_tokenizer(*STRADDLING, pad_token=pad_token)


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece's way: a space is a visible character, unknown characters fall back to bytes."""
    pieces = [
        "<unk>",
        *"▁abcdefghijklmnopqrstuvwxyz<>/?",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁a",
        "</",
        "?</",
    ]
    backend = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            [("▁", "a"), ("<", "/"), ("?", "</")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token=EOS, pad_token="<|pad|>")


WORDS = "who where is ? Paris Rome France Italy capital of the city . a b search documents".split()


def word_tokenizer() -> PreTrainedTokenizerBase:
    """A few whole words; every tag is one token, so that a random policy searches and answers now and then."""
    return word_level_tokenizer(WORDS, PROTOCOL.tags)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte": byte_tokenizer,
    "bpe": bpe_tokenizer,
    "bpe, pad = eos": lambda: bpe_tokenizer(pad_token=EOS),
    "metaspace": metaspace_tokenizer,
    "word": word_tokenizer,
}

# What a rollout is about

PROTOCOL = Protocol(
    "question: {question} ", documents_tag="documents", question_mark=False, invalid_message=" invalid action "
)
QUESTION = Question("q0", "where is Paris ?", ("Paris", "City of Light"), "toy")
PASSAGES = tuple(
    Passage(str(i), text)
    for i, text in enumerate(
        (
            '"Paris"\nParis is the capital of France .',
            '"Rome"\nRome is the capital of Italy .',
            '"France"\nFrance is where Paris is .',
            '"Italy"\nItaly is where Rome is .',
            '"Seine"\na river of Paris',
            '"Tiber"\na river of Rome',
        )
    )
)


class ToyRetriever:
    """Six passages, ranked by the words they share with the query; remembers what it was asked.

    Args:
        passages: others than the six.
        fail: sees each batch of queries first, and may raise.
    """

    def __init__(
        self, passages: Sequence[Passage] = PASSAGES, fail: Callable[[Sequence[str]], None] = lambda queries: None
    ) -> None:
        self.passages, self.fail = passages, fail
        self.calls: list[list[str]] = []

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        self.calls.append(list(queries))
        self.fail(queries)
        return [sorted(self.passages, key=lambda p: -self._shared(query, p))[:k] for query in queries]

    @staticmethod
    def _shared(query: str, passage: Passage) -> int:
        return len(set(query.lower().split()) & set(passage.contents.lower().split()))


# Players

Turns = Sequence[str]
LIMITS, SAMPLED = Limits(), Sampling()


def start(
    codec: TokenCodec, protocol: Protocol = PROTOCOL, limits: Limits = LIMITS, question: Question = QUESTION
) -> Conversation:
    """A conversation that waits for its first token."""
    return Conversation(make_request(codec, question, protocol=protocol), protocol, codec, limits)


def make_request(
    codec: TokenCodec,
    question: Question = QUESTION,
    instance_id: InstanceId = (0, 0),
    index: int = 0,
    sampling: Sampling = SAMPLED,
    protocol: Protocol = PROTOCOL,
) -> RolloutRequest:
    """A request with a seed of its own."""
    prompt_ids = protocol.prompt_ids(codec, question.text)
    seed = 1000 * instance_id[1] + index
    return RolloutRequest(question, instance_id, index, prompt_ids, seed, sampling)


def play(
    conversation: Conversation,
    codec: TokenCodec,
    turns: Turns,
    search: Callable[[str], Sequence[Passage] | RetrievalError] = lambda query: PASSAGES[:1],
) -> Trajectory:
    """Speak the turns, each as far as the conversation lets it, and then end-of-sequence until it stops.

    The log-prob of the i-th sampled token is -i / 8, so that a shifted one shows.
    """
    said = 0
    for turn in (*map(codec.encode, turns), *((codec.eos_id,),) * 99):
        for token_id in turn:
            if conversation.stop_reason is not None:
                return conversation.finish()
            said += 1
            event = conversation.accept(token_id, -said / 8)
            if isinstance(event, Search):
                conversation.observe(search(event.query))
            if not isinstance(event, Continue) or event.forced:
                break
    return conversation.finish()


class ScriptedEngine(Engine):
    """Plays given turns; searches go through the pool, so failures are those of a real run.

    Args:
        codec: of the run.
        script: turns of a request.
    """

    def __init__(self, codec: TokenCodec, script: Callable[[RolloutRequest], Turns]) -> None:
        self.codec, self.script = codec, script
        self.requests: list[RolloutRequest] = []

    def run(self, requests: Sequence[RolloutRequest]) -> list[Trajectory]:
        self.requests = list(requests)
        return [play(self.start(request), self.codec, self.script(request), self._search) for request in requests]

    def _search(self, query: str) -> Sequence[Passage] | RetrievalError:
        return self.searches.submit([query]).result()[0]


class ScriptedPolicy(nn.Module):
    """Plays a flat list of tokens per prompt with probability 1, for engines that decode with a KV cache.

    The cache holds the tokens themselves, so `contexts` are what a real model would have attended to.

    Args:
        scripts: tokens to sample, by prompt; then the last one again and again.
        num_tokens: size of the vocabulary.
    """

    def __init__(self, scripts: Mapping[tuple[int, ...], Sequence[int]], num_tokens: int) -> None:
        super().__init__()
        self.max_context = None
        self.device_holder = nn.Parameter(torch.zeros(()))
        self.scripts, self.num_tokens = scripts, num_tokens
        self.contexts: dict[tuple[int, ...], list[int]] = {}

    def decode(
        self, token_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Any, last: Tensor
    ) -> Tensor:
        cells = token_ids[:, None, :, None].double()
        # The engine feeds a sampled token together with what it forces: a chunk's first cell counts sampled tokens.
        firsts = torch.zeros_like(cells)
        firsts[:, :, :1] = 1.0
        tokens, firsts = (t[:, 0, :, 0].long() for t in cache.update(cells, firsts, 0))
        logits = torch.full((len(tokens), self.num_tokens), -1e9, dtype=torch.float64)
        for row, (context, first, mask) in enumerate(zip(tokens, firsts, attention_mask, strict=True)):
            seen = context[mask].tolist()
            assert position_ids[row, last[row]] == len(seen) - 1 or not mask[-token_ids.shape[1]], "positions are dense"
            prompt = next(p for p in self.scripts if tuple(seen[: len(p)]) == p)
            self.contexts[prompt] = seen
            script = self.scripts[prompt]
            logits[row, script[min(int(first[mask].sum()) - 1, len(script) - 1)]] = 0.0
        return logits


def tiny_model(tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama in float64 with grouped-query attention; its logits are far from uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.3,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
        return LlamaForCausalLM(config).double().eval()


class TalkativePolicy(Policy):
    """`tiny_model` over whole words, with a constant leaning towards the tags: it searches and answers by chance."""

    def __init__(self, codec: TokenCodec, seed: int = 0) -> None:
        super().__init__(tiny_model(codec.tokenizer, seed))
        leaning = {"<search>": 1.5, "</search>": 2.5, "<answer>": 0.0, "</answer>": 0.5, "<eos>": 0.0}
        bias = torch.full((len(codec.tokenizer),), -1.0, dtype=torch.float64)
        bias[[codec.encode(word)[0] for word in WORDS]] = 0.0
        for text, value in leaning.items():
            bias[codec.encode(text)[0]] = value
        self.register_buffer("bias", bias)

    def _head(self, rows: Tensor) -> Tensor:
        return super()._head(rows) + self.bias


# Trajectories

LETTERS = {
    "P": SpanKind.PROMPT,
    "R": SpanKind.REASONING,
    "Q": SpanKind.QUERY,
    "F": SpanKind.REFINE,
    "A": SpanKind.ANSWER,
    "S": SpanKind.SCAFFOLD,
    "O": SpanKind.OBSERVATION,
}


def make_trajectory(
    script: str = "R Q O R A",
    *,
    question: Question = QUESTION,
    instance_id: InstanceId = (0, 0),
    index: int = 0,
    codec: TokenCodec | None = None,
    **assigned: Any,
) -> Trajectory:
    """A finished rollout from a line such as `R:hm Q:capital_of_France O A:Paris`.

    Each word is a span, by its letter in `LETTERS`; text after the colon, `_` for a space. Q and A get their tags.

    Args:
        script: the spans after the prompt.
        question: what it is about.
        instance_id: of its group.
        index: within the group.
        codec: tokens come from it; by default one token per byte.
        assigned: other fields of `Trajectory`.
    """
    codec = codec or TokenCodec(byte_tokenizer(), PROTOCOL.tags)
    spans = [Span(SpanKind.PROMPT, PROTOCOL.prompt_ids(codec, question.text))]
    texts: dict[str, list[str]] = {letter: [] for letter in LETTERS}

    def sampled(kind: SpanKind, text: str) -> Span:
        token_ids = codec.encode(text)
        before = sum(len(span.token_ids) for span in spans if span.sampled)
        return Span(kind, token_ids, tuple(-(before + i + 1) / 8 for i in range(len(token_ids))), sampled=True)

    for word in script.split():
        letter, _, text = word.partition(":")
        text = text.replace("_", " ") or {"Q": "capital of France", "A": question.answers[0]}.get(letter, "hm")
        texts[letter].append(text)
        tag = {"Q": "search", "A": "answer"}.get(letter)
        if letter == "O":
            spans.append(Span(LETTERS[letter], PROTOCOL.observation_ids(codec, text)))
            continue
        spans += [sampled(SpanKind.SCAFFOLD, f"<{tag}>")] if tag else []
        spans += [sampled(LETTERS[letter], text)]
        spans += [sampled(SpanKind.SCAFFOLD, f"</{tag}>")] if tag else []
    fields = {
        "queries": tuple(texts["Q"]),
        "passages": tuple(PASSAGES[:1] for _ in texts["O"]),
        "answer": texts["A"][0] if texts["A"] else None,
        "refinements": tuple(texts["F"]),
        "stop_reason": StopReason.ANSWERED if texts["A"] else StopReason.MAX_TOKENS,
    }
    return Trajectory(question, instance_id, index, tuple(spans), **fields | assigned)


def drawing(trajectory: Trajectory) -> list[str]:
    """Each turn as a row of letters, one per sampled token."""
    names = {kind: letter for letter, kind in LETTERS.items()}
    rows = [""]
    for span in trajectory.spans[1:]:
        if span.sampled:
            rows[-1] += names[span.kind] * len(span.token_ids)
        else:
            rows.append("")
    return rows if rows[-1] else rows[:-1]
