"""What docs/metrics.md lists."""

from __future__ import annotations

import re
from dataclasses import dataclass

from helpers.paths import ROOT

METRICS_PAGE = ROOT / "docs" / "metrics.md"


@dataclass
class Page:
    """What the page lists in the first cells of its tables."""

    keys: set[str]
    families: set[str]
    """`val/` of `val/<score>`."""
    scores: set[str]


def read_page(text: str) -> Page:
    cells = set(re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE))
    families = {cell.removesuffix("<score>") for cell in cells if cell.endswith("<score>")}
    scores = {cell for cell in cells if "/" not in cell}
    return Page({cell for cell in cells if "/" in cell and not cell.endswith("<score>")}, families, scores)
