"""Tokenizers made in code: bytes, merges that reach across the edge of a tag, SentencePiece's way, and whole words."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from helpers.passages import PROTOCOL
from sdsearch_lightning.policy.loading import word_level_tokenizer

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
