"""Kernels by kind, as the profiler tells them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.kernel_time import KINDS, REST, busy_seconds, kernel_seconds, kind_of


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::mm", "products"),
        ("aten::addmm", "products"),
        ("aten::mul", REST),
        ("aten::mm_like", REST),
        ("aten::_scaled_dot_product_efficient_attention", "attention"),
        ("aten::_flash_attention_forward", "attention"),
        ("torch_attn::_varlen_attn", "attention"),
        ("aten::topk", "sorting"),
        ("aten::amax", "sorting"),
        ("aten::copy_", REST),
    ],
)
def test_operators_have_a_kind(operator: str, kind: str) -> None:
    assert kind_of(operator) == kind


def multiply() -> None:
    one = torch.ones(400, 400)
    for _ in range(20):
        one @ one


def attend() -> None:
    query = torch.ones(1, 4, 400, 32)
    for _ in range(20):
        torch.nn.functional.scaled_dot_product_attention(query, query, query)


def rank() -> None:
    one = torch.rand(50, 4000)
    for _ in range(20):
        one.topk(300)


@pytest.mark.parametrize(("function", "kind"), [(multiply, "products"), (attend, "attention"), (rank, "sorting")])
def test_most_of_the_time_is_of_the_kind_that_was_asked_for(function: Callable[[], None], kind: str) -> None:
    found = kernel_seconds(function, "cpu")
    assert list(found) == [*KINDS, REST]
    assert found[kind] > 0.5 * sum(found.values()) > 0


def test_busy_seconds_grow_with_the_work() -> None:
    multiply()
    once, often = busy_seconds(multiply, "cpu"), busy_seconds(lambda: [multiply() for _ in range(30)], "cpu")
    assert often > 5 * once > 0
