"""What is wrong with a YAML file as a file: no YAML, empty, or a key that stands twice. The parser reads the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from sdsearch_lightning.errors import ConfigError


def check_config_files(argv: Sequence[str]) -> None:
    """Reads each file that `--config` names, as far as there is one.

    Raises:
        ConfigError: names the file and the line.
    """
    for path in _files(argv):
        try:
            root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            line = 0 if error.problem_mark is None else error.problem_mark.line + 1
            raise ConfigError(f"{path}, line {line}: this is no YAML: {error.problem}.") from error
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: this is no YAML text: {error}.") from error
        if root is None:
            raise ConfigError(f"{path}: expected keys such as `trainer:`, found nothing in it. Leave --config out.")
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}, line 1: expected keys such as `trainer:`, found a {root.id}.")
        for key, first, second in _twice(root):
            raise ConfigError(
                f"{path}, line {second}: the key {key!r} stands in line {first} already, and would replace what is "
                "there. Write both as one."
            )


def _files(argv: Sequence[str]) -> Iterator[Path]:
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name == "--config" and (path := Path(value if equals else following)).is_file():
            yield path


def _twice(node: yaml.Node) -> Iterator[tuple[str, int, int]]:
    """Keys that a mapping at or below `node` has twice, with both lines."""
    children = node.value if isinstance(node, (yaml.MappingNode, yaml.SequenceNode)) else []
    lines: dict[str, int] = {}
    for child in children:
        if isinstance(child, tuple):
            key, child = child
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                yield key.value, lines[key.value], line
            lines[str(key.value)] = line
        yield from _twice(child)
