from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from arft_fast.kernels import policy_loss
from benchmarks.flops import FORMULAS, counted_flops

aten = torch.ops.aten


def _attend(length: int, causal: bool) -> torch.Tensor:
    q, k, v = (torch.randn(2, 3, length, 8, requires_grad=True) for _ in range(3))
    return scaled_dot_product_attention(q, k, v, is_causal=causal)


def test_a_causal_call_counts_as_a_triangle() -> None:
    counts = []
    for causal in (True, False):
        with counted_flops() as forward:
            output = _attend(11, causal)
        with counted_flops() as backward:
            output.sum().backward()
        counts.append((forward.total, backward.total))
    a_pair = 2 * 2 * 3 * 8  # multiply and add, batch, heads, width
    assert counts[0] == (2 * a_pair * 66, 5 * a_pair * 66)
    assert counts[1] == (2 * a_pair * 121, 5 * a_pair * 121)


def test_torchs_own_counter_sees_no_attention_on_a_cpu() -> None:
    with FlopCounterMode(display=False) as counter:
        _attend(11, causal=True)
    assert counter.get_total_flops() == 0  # the reason for ours; when this fails ours may become smaller


@pytest.mark.parametrize("frozen", [False, True])
def test_products_inside_our_operators_are_counted(impl: Any, frozen: bool) -> None:
    hidden = torch.randn(30, 16, requires_grad=True)
    weight = torch.randn(50, 16, requires_grad=not frozen)
    cu_seqlens, token_ids = torch.tensor([0, 10, 30]), torch.arange(30)
    with counted_flops() as count:
        loss, _ = policy_loss(hidden, weight, token_ids, torch.tensor([1.0, -1.0]), cu_seqlens=cu_seqlens, impl=impl)
        loss.backward()
    assert count.total == (2 if frozen else 3) * 2 * 30 * 16 * 50


@pytest.mark.parametrize("impl", ["native"], indirect=True)
def test_rows_without_a_gradient_are_not_counted_as_if_they_had_one(impl: Any) -> None:
    hidden, weight = torch.randn(30, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    with counted_flops() as count:
        loss, _ = policy_loss(
            hidden, weight, torch.arange(30), torch.tensor([1.0, 0.0]), cu_seqlens=torch.tensor([0, 10, 30]),
            measure_all=True, impl=impl,
        )  # fmt: skip
        loss.backward()
    assert count.total == (30 + 2 * 10) * 2 * 16 * 50


def test_counting_leaves_results_as_they_are() -> None:
    q, k, v = torch.randn(3, 2, 3, 7, 8)
    with counted_flops():
        counted = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(counted, scaled_dot_product_attention(q, k, v, is_causal=True))


def test_packed_calls_count_segment_by_segment() -> None:
    cu = torch.tensor([0, 4, 10])
    packed = [torch.zeros(10, 3, 8) for _ in range(3)]
    a_pair = 2 * 3 * 8
    forward = FORMULAS[aten._flash_attention_forward]
    assert forward(*packed, cu, cu, 6, 6, 0.0, True, False) == 2 * a_pair * (10 + 21)
    assert forward(*packed, cu, torch.tensor([0, 2, 5]), 6, 3, 0.0, False, False) == 2 * a_pair * (4 * 2 + 6 * 3)
    backward = FORMULAS[aten._flash_attention_backward]
    assert backward(packed[0], *packed, packed[0], None, cu, cu, 6, 6, 0.0, True) == 5 * a_pair * (10 + 21)
