"""Group-relative advantages against plain Python, and exact zeros where a group has no contrast."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.scoring.advantages import group_relative

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0], [0.1, 0.7, 0.25, 0.0, 1.0]], dtype=torch.float64)


def matches(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return actual.dtype == expected.dtype and torch.allclose(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("eps", [1e-6, 1e-4, 0.0])
def test_std_is_the_sample_standard_deviation(eps: float) -> None:
    def expected(deviation) -> torch.Tensor:  # type: ignore[no-untyped-def]
        rows = REWARDS.tolist()
        return torch.tensor(
            [[(r - statistics.fmean(row)) / (deviation(row) + eps) for r in row] for row in rows], dtype=torch.float64
        )

    actual = group_relative(REWARDS, eps=eps)
    assert matches(actual, expected(statistics.stdev))
    assert not matches(actual, expected(statistics.pstdev))  # ddof 0 is another convention
    assert not matches(actual * (1 + 1e-9), expected(statistics.stdev))


def test_eps_defaults_to_search_r1s() -> None:
    assert matches(group_relative(REWARDS), group_relative(REWARDS, "std", 1e-6))
    assert not matches(group_relative(REWARDS), group_relative(REWARDS, "std", 1e-4))


def test_none_keeps_reward_units() -> None:
    assert matches(group_relative(REWARDS, "none"), REWARDS - REWARDS.mean(1, keepdim=True))
    assert not matches(group_relative(REWARDS, "none"), group_relative(REWARDS, "std"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_a_group_without_contrast_gives_exactly_zero(dtype: torch.dtype, scale: str, size: int) -> None:
    values = torch.tensor([0.1, 0.3, 1 / 3, 1.0, -0.7, 0.0, 1e6], dtype=dtype)
    advantages = group_relative(values[:, None].expand(-1, size).contiguous(), scale)  # type: ignore[arg-type]
    assert advantages.dtype == dtype
    assert torch.equal(advantages, torch.zeros(7, size, dtype=dtype))


def test_groups_do_not_see_each_other() -> None:
    for row in range(len(REWARDS)):
        assert torch.equal(group_relative(REWARDS)[row], group_relative(REWARDS[row : row + 1])[0])


def test_a_tiny_contrast_is_not_rounded_to_zero() -> None:
    rewards = torch.tensor([[1.0, 1.0 + 1e-9]], dtype=torch.float64)
    deviation = 1e-9 / math.sqrt(2)
    assert group_relative(rewards)[0, 1].item() == pytest.approx(0.5e-9 / (deviation + 1e-6), rel=1e-6)


def test_an_unknown_scale_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'batch': expected one of std, none"):
        group_relative(REWARDS, "batch")  # type: ignore[arg-type]
