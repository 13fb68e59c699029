"""What a verdict is worth, by hand in plain Python; each formula is told from a slightly wrong one."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.losses import CAST, RLCSD, RLSD, SDAR, Distillation, TeacherUse

RATIOS, ADVANTAGES, LABELS = (-40.0, -0.7, -0.1, 0.0, 0.05, 0.9, 40.0), (-1.3, 0.0, 0.4), (-1.0, 0.0, 1.0)
TOKENS = list(product(RATIOS, ADVANTAGES, LABELS))
Rule = Callable[[float, float, float], tuple[float, float]]


def sign(x: float) -> int:
    return (x > 0) - (x < 0)


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def distillation(ratio: float, a: float, label: float) -> tuple[float, float]:
    return a, 1.0


def rlsd(mix: float, width: float) -> Rule:
    return lambda ratio, a, label: (
        a * ((1 - mix) + mix * clip(math.exp(sign(a) * ratio), 1 - width, 1 + width)),
        0.0,
    )


def sdar(slope: float) -> Rule:
    return lambda ratio, a, label: (a, 1 / (1 + math.exp(-slope * ratio)))


def cast(base: float, flip: float, divergence: float) -> Rule:
    def rule(ratio: float, a: float, label: float) -> tuple[float, float]:
        wanted = a if a != 0 else base * label
        agreement = sign(ratio) * sign(wanted)
        return {1: (wanted, divergence), 0: (a, 0.0), -1: (-flip * wanted, 0.0)}[agreement]

    return rule


def rlcsd(scale: float, temperature: float, threshold: float) -> Rule:
    def rule(ratio: float, a: float, label: float) -> tuple[float, float]:
        bonus = scale * math.tanh(ratio / temperature)
        shaped = a + (bonus if abs(bonus) > threshold else 0.0)
        return (shaped if sign(shaped) == sign(a) else 0.0), 0.0

    return rule


CASES: list[tuple[TeacherUse, Rule, Rule]] = [
    (Distillation(), distillation, lambda *token: (token[1] + 1e-10, 1.0)),
    (RLSD(), rlsd(0.5, 0.2), rlsd(0.5, 0.2 + 1e-10)),
    (RLSD(0.7, 0.9), rlsd(0.7, 0.9), rlsd(0.7 + 1e-10, 0.9)),
    (RLSD(1.0, 1.0), rlsd(1.0, 1.0), lambda ratio, a, label: (a * clip(math.exp(ratio), 0, 2), 0.0)),  # no sign(A)
    (SDAR(), sdar(5.0), sdar(5.0 + 1e-9)),
    (SDAR(0.3), sdar(0.3), lambda *token: (token[1], 1.0)),
    (CAST(), cast(0.1, 0.0, 0.0), cast(0.1, 1e-10, 0.0)),
    (CAST(0.2, 0.5, 0.3), cast(0.2, 0.5, 0.3), cast(0.2 + 1e-10, 0.5, 0.3)),
    (CAST(0.0, 0.5, 1.0), cast(0.0, 0.5, 1.0), cast(0.0, 0.5, 1.0 + 1e-10)),
    (RLCSD(), rlcsd(0.5, 1.3, 0.02), rlcsd(0.5, 1.3 + 1e-9, 0.02)),
    (RLCSD(2.0, 0.02, 0.0), rlcsd(2.0, 0.02, 0.0), rlcsd(2.0 + 1e-10, 0.02, 0.0)),
    (RLCSD(0.5, 1.3, 0.1), rlcsd(0.5, 1.3, 0.1), rlcsd(0.5, 1.3, 0.01)),
]


def of_all_tokens(rule: Rule) -> Tensor:
    """[C, 2]."""
    return torch.tensor([rule(*token) for token in TOKENS], dtype=torch.float64)


@pytest.mark.parametrize(("use", "rule", "wrong"), CASES, ids=[type(use).__name__ for use, _, _ in CASES])
def test_the_formula_by_hand(use: TeacherUse, rule: Rule, wrong: Rule) -> None:
    given = torch.stack(use.weigh(*torch.tensor(TOKENS, dtype=torch.float64).unbind(1)), dim=1)
    torch.testing.assert_close(given, of_all_tokens(rule), rtol=0, atol=1e-12)
    assert not torch.allclose(given, of_all_tokens(wrong), rtol=0, atol=1e-12)
    assert (given[:, 1] >= 0).all()


def test_the_default_leaves_advantages_as_the_very_same_tensor() -> None:
    advantages = torch.tensor([1.0, -2.0])
    given, gate = Distillation().weigh(torch.tensor([0.3, math.inf]), advantages, torch.ones(2))
    assert given is advantages and gate.tolist() == [1, 1]


@pytest.mark.parametrize("use", [RLSD(1.0, 0.9), RLCSD(5.0)], ids=["RLSD", "RLCSD"])
def test_no_sign_is_turned_where_the_reward_sets_it(use: TeacherUse) -> None:
    ratio, advantages, labels = torch.tensor(TOKENS, dtype=torch.float64).unbind(1)
    shaped, _ = use.weigh(ratio, advantages, labels)
    assert ((shaped.sign() == advantages.sign()) | (shaped == 0)).all() and not torch.equal(shaped, advantages)


def test_a_teacher_of_probability_zero_is_finite() -> None:
    for use in (RLSD(), SDAR(), CAST(), RLCSD()):
        given = use.weigh(torch.full((2,), -math.inf), torch.tensor([1.0, -1.0]), torch.ones(2))
        assert all(part.isfinite().all() for part in given)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (RLSD, {"mix": 1.5}, r"expected RLSD.mix to be a number in \[0, 1\], found 1.5"),
        (RLSD, {"clip": -0.1}, r"expected RLSD.clip to be a number in \[0, 1\], found -0.1"),
        (SDAR, {"slope": -1.0}, "expected SDAR.slope to be a finite number of at least 0, found -1.0"),
        (CAST, {"base": math.inf}, "expected CAST.base to be a finite number of at least 0, found inf"),
        (CAST, {"flip": -1.0}, "expected CAST.flip"),
        (CAST, {"divergence": math.nan}, "expected CAST.divergence"),
        (RLCSD, {"scale": -1.0}, "expected RLCSD.scale"),
        (RLCSD, {"threshold": -1.0}, "expected RLCSD.threshold"),
        (RLCSD, {"temperature": 0.0}, "RLCSD.temperature: expected a finite number above 0, found 0.0"),
    ],
)
def test_impossible_options_are_refused(kind: type, options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**options)


# A user's own


def mine(weigh: Callable[..., Any]) -> Any:
    """A class of the user's, with no base and no annotation."""
    return type("Mine", (), {"weigh": lambda self, *args: weigh(*args)})()


def test_a_look_alike_is_accepted_after_a_probe() -> None:
    found = mine(lambda ratio, advantages, labels: (advantages * 2, labels * 0))
    assert TeacherUse.adopt(found) is found and isinstance(found, TeacherUse)


@pytest.mark.parametrize(
    "weigh",
    [
        lambda ratio, a, labels: a,
        lambda ratio, a, labels: (a, 1.0),
        lambda ratio, a, labels: (a[:1], labels * 0),
        lambda ratio, a, labels: (a / 0, labels * 0),
        lambda ratio, a, labels: (a, labels),
        lambda ratio, a, labels: (a, labels * 0, a),
    ],
    ids=["no weights", "a number", "another shape", "not finite", "below 0", "too many"],
)
def test_what_gives_something_else_is_refused_at_the_start(weigh: Callable[..., Tensor]) -> None:
    with pytest.raises(ConfigError, match=r"expected Mine.weigh to give two tensors \[C\]") as caught:
        TeacherUse.adopt(mine(weigh))
    assert "See losses.TeacherUse.weigh." in str(caught.value)
