"""Fixtures that every tier shares; what they are made of is in helpers/."""

from __future__ import annotations

from collections.abc import Generator

import pytest
import torch

from helpers.passages import PROTOCOL, ToyRetriever
from helpers.tokenizers import TOKENIZERS, bpe_tokenizer, byte_tokenizer, word_tokenizer
from sdsearch_lightning.protocol.tokenization import TokenCodec

torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Half a character in what a test printed or logged could not be sent to the process that reports."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-models", action="store_true", help="write the table of docs/models.md anew")


@pytest.fixture(scope="session")
def byte_codec() -> TokenCodec:
    """One token per byte, so that an ASCII text and its tokens can be drawn below each other."""
    return TokenCodec(byte_tokenizer(), PROTOCOL.tags)


@pytest.fixture(scope="session")
def bpe_codec() -> TokenCodec:
    """Tokens reach across tag edges."""
    return TokenCodec(bpe_tokenizer(), PROTOCOL.tags)


@pytest.fixture(scope="session")
def word_codec() -> TokenCodec:
    """A token is a word or a tag."""
    return TokenCodec(word_tokenizer(), PROTOCOL.tags)


@pytest.fixture(scope="session", params=TOKENIZERS)
def any_codec(request: pytest.FixtureRequest) -> TokenCodec:
    """Each of the tokenizers in turn."""
    return TokenCodec(TOKENIZERS[request.param](), PROTOCOL.tags)


@pytest.fixture
def retriever() -> ToyRetriever:
    """Six passages."""
    return ToyRetriever()
