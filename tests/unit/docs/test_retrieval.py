"""docs/retrieval.md: its configurations can be used, and its commands have the flags that they show."""

import re
import shlex

import pytest
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from helpers.paths import ROOT
from sdsearch_lightning.cli.retrieval import _index_parser, _serve_parser
from sdsearch_lightning.datamodules import SearchDataModule
from sdsearch_lightning.retrieval import DenseRetriever, Retriever
from sdsearch_lightning.retrieval.server.limits import ServerLimits

PAGES = [(ROOT / name).read_text() for name in ("docs/retrieval.md", "README.md")]
SNIPPETS = re.findall(r"```yaml\n(data:.*?)```", PAGES[0], re.DOTALL)
COMMANDS = re.findall(r"^(?:[A-Z_]+=\S+ )?sdsearch ((?:index|serve) --.*?)(?:  #.*)?$", "\n".join(PAGES), re.MULTILINE)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_configuration_makes_its_retriever(snippet):
    config = yaml.safe_load(snippet)
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(SearchDataModule, "data", subclass_mode=True)
    made = parser.instantiate(parser.parse_object(config)).data.retriever
    assert isinstance(made, Retriever) and type(made).__name__ == config["data"]["retriever"]["class_path"]
    if hasattr(made, "retriever"):
        assert isinstance(made.retriever, DenseRetriever) and made.retriever.factory == "IVF16384,SQ8"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_these_flags(command):
    name, *flags = shlex.split(command)
    options = {"index": _index_parser, "serve": _serve_parser}[name]().parse_args(flags)
    assert options.corpus_path and options.index_path


def test_flags_have_the_defaults_of_the_limits():
    options = _serve_parser().parse_args(["--corpus_path", "c", "--index_path", "i"])
    for name in ("max_request_passages", "max_client_connections"):
        assert getattr(options, name) == getattr(ServerLimits(), name)


def test_something_was_found():
    assert len(SNIPPETS) == 3 and len(COMMANDS) == 3
