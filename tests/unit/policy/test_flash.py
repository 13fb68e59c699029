"""What the one-kernel path hands to its kernel, seen with a kernel written out: the same as a call per segment."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.models import TalkativePolicy
from sdsearch_lightning.policy.attention import Call, CausalSegments, Segment, causal_mask
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.rollout.kv_rows import KVRows, KVShape, NewTokens, RowsAttention

TREES = {
    "sequences": [Segment(3), Segment(1), Segment(9)],
    "suffixes": [Segment(4), Segment(2, 0), Segment(5, 0), Segment(3), Segment(1, 3), Segment(6)],
}


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    limits: Tensor,
    key_limits: Tensor,
    longest: int,
    longest_keys: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
) -> Tensor:
    """torch.nn.attention.varlen.varlen_attn, written out: queries are the last of their keys."""
    assert query.shape[1] == key.shape[1] and window_size[1] == 0
    assert longest == limits.diff().max() and longest_keys == key_limits.diff().max()
    outputs = []
    for i in range(len(limits) - 1):
        q, k, v = query[limits[i] : limits[i + 1]], *(x[key_limits[i] : key_limits[i + 1]] for x in (key, value))
        window = None if window_size[0] < 0 else window_size[0] + 1
        mask = causal_mask(len(q), len(k), window, device=q.device)
        logits = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
        outputs.append(torch.einsum("hqk,khd->qhd", logits.masked_fill(~mask, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("tree", TREES)
def test_one_kernel_sees_what_a_call_per_segment_sees(
    tree: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    torch.manual_seed(0)
    segments = TREES[tree]
    total = sum(segment.length for segment in segments)
    inputs = [torch.randn(1, heads, total, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    call, weight = Call(0, *inputs, scale=0.3, window=window), torch.randn(1, 4, total, 8, dtype=torch.float64)
    expected = CausalSegments(segments).attend(call)
    found = CausalSegments(segments)._fused(call)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    wanted, got = (torch.autograd.grad((output * weight).sum(), inputs) for output in (expected, found))
    for one, other in zip(wanted, got, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-12)
    apart = [Segment(segment.length) for segment in segments]
    if tree == "suffixes":
        assert not torch.allclose(CausalSegments(apart)._fused(call), expected, atol=1e-3), "prefixes count"


@pytest.mark.parametrize("window", [None, 5])
def test_rows_read_in_one_kernel_what_they_read_one_by_one(
    window: int | None, word_codec: TokenCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    torch.manual_seed(0)
    shape = KVShape.of(TalkativePolicy(word_codec))
    (key, value), new = shape.cells[0], [NewTokens(2, 4, 3), NewTokens(0, 0, 6), NewTokens(1, 7, 1)]
    total, cells = 10, torch.tensor([6, 8])
    inputs = [torch.randn(1, heads, total + 2, key.width, dtype=torch.float64) for heads in (4, key.heads, value.heads)]
    held = [torch.randn(3, cell.heads, 12, cell.width, dtype=torch.float64) for cell in (key, value)]

    def attend(fused: bool) -> tuple[Tensor, list[Tensor]]:
        rows = KVRows(shape, num_rows=3, capacity=12)
        rows.reach(12)
        for side, cells_before in zip(rows.layer(0), held, strict=True):
            side[:, :, :12] = cells_before
        layout = RowsAttention(rows, new, cells, 9)
        if fused:
            monkeypatch.setattr(Call, "fits_flash", True)
        output = layout.attend(Call(0, *inputs, window=window))
        return output, [side[:, :, :12].clone() for side in rows.layer(0)]

    expected, filled = attend(fused=False)
    found, filled_too = attend(fused=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(filled, filled_too, strict=True))
