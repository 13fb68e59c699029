"""How far a rollout keeps the form that its prompt asks for: what rewards of the format are made of."""

from __future__ import annotations

import re
from collections.abc import Sequence

LOOSE = "loose"


def format_faults(turns: Sequence[str], inner: Sequence[str], actions: Sequence[str]) -> tuple[str, ...]:
    """What is wrong with the form of a rollout's turns, in words; () where nothing is.

    `loose`: a turn is not made of contents of `inner` tags, each at most once, and of one action behind them, with
    nothing but white space between. `unbalanced X`: a tag is opened more or less often than closed. `missing X`: it
    does not occur.

    Args:
        turns: what the policy wrote, turn by turn.
        inner: names of tags that lead to an action: think, refine.
        actions: names of tags that are one: search, answer.

    Example:
        >>> format_faults(["<think> a </think><search> b </search>"], ["think"], ["search", "answer"])
        ('missing answer',)
    """
    names = (*inner, *actions)
    free = rf"(?:(?!</?(?:{'|'.join(map(re.escape, names))})>).)*"
    before, behind = ("|".join(map(re.escape, part)) for part in (inner, actions))
    turn = re.compile(rf"\s*(?:<({before})>{free}</\1>\s*){{1,{len(inner)}}}<({behind})>{free}</\2>\s*", re.DOTALL)
    text = "".join(turns)
    found = [LOOSE] if not all(map(turn.fullmatch, turns)) else []
    for name in names:
        opened, closed = text.count(f"<{name}>"), text.count(f"</{name}>")
        found += [f"unbalanced {name}"] if opened != closed else []
        found += [f"missing {name}"] if not opened else []
    return tuple(found)
