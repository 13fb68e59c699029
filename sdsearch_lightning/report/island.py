"""Data inside a page: JSON that no text of it can end."""

from __future__ import annotations

import json
from typing import Any

_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def island(value: Any) -> str:
    """JSON that may stand inside a `script` element: it cannot end it, nor open a comment or another one."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)
