r"""Half a character: what JSON can write (`"\ud83d"`), and no tokenizer, file or terminal takes.

Files with it are refused, row and all; what a search returns is repaired, since a run should not end with it.
"""

from __future__ import annotations

from typing import Any


def is_whole(value: Any) -> bool:
    """Whether every text in a JSON value can be written."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return False
    if isinstance(value, dict):
        return all(is_whole(key) and is_whole(item) for key, item in value.items())
    return all(map(is_whole, value)) if isinstance(value, list | tuple) else True


def repaired(text: str) -> str:
    """`text` with U+FFFD in the place of half a character."""
    return text if is_whole(text) else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
