"""Columns that belong together, a row per token: joined and cut as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch

Rows = TypeVar("Rows", bound=Any)
"""A dataclass of tensors with one first dimension; a column may be None, in all parts alike."""


def join(parts: Sequence[Rows]) -> Rows:
    """All rows of all parts, in order; at least one part."""
    columns = {field.name: [getattr(part, field.name) for part in parts] for field in fields(parts[0])}
    joined = {name: None if column[0] is None else torch.cat(column) for name, column in columns.items()}
    return replace(parts[0], **joined)


def select(rows: Rows, where: slice) -> Rows:
    """Some of the rows."""
    columns = {field.name: getattr(rows, field.name) for field in fields(rows)}
    return replace(rows, **{name: None if column is None else column[where] for name, column in columns.items()})
