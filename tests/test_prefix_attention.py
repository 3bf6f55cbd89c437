"""Attention over a forest is ordinary attention over each path, gradients included; and how that can fail."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from arft_fast.kernels import cascade, prefix_attention
from arft_fast.kernels.attention_tree import AttentionTree
from arft_fast.kernels.flash_operators import HostOperators
from arft_fast.kernels.prefix_attention import TreeImpl, cascade_fault
from tests.attention_forests import (
    FORESTS,
    FOUR_LEVELS,
    GROUP_OF_8,
    THREE_GROUPS,
    OwnStatistics,
    Problem,
    forest,
    leaves,
    path_by_path,
    plain_attention,
    problem,
    random_forest,
    worst,
)

IMPLS = pytest.mark.parametrize("impl", ["cascade", "dense"])
TREES = pytest.mark.parametrize("tree", FORESTS.values(), ids=FORESTS)


def run(given: Problem, tree: AttentionTree, impl: TreeImpl, scale: float | None = None) -> tuple[Tensor, ...]:
    out = prefix_attention(*given.operands, tree, scale=scale, impl=impl)
    return out.detach(), *torch.autograd.grad(out, given.operands, given.upstream_of_rows(tree))


@IMPLS
@TREES
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (6, 2), (3, 1)])
def test_output_and_gradients_are_those_of_each_path(
    tree: AttentionTree, impl: TreeImpl, heads: int, groups: int
) -> None:
    given = problem(tree, heads, groups)
    assert worst(run(given, tree, impl), path_by_path(given, tree)) <= 1e-13


@IMPLS
@pytest.mark.parametrize("seed", range(12))
def test_random_forests_are_exact(seed: int, impl: TreeImpl) -> None:
    tree = random_forest(seed)
    given = problem(tree, heads=4, groups=2)
    assert worst(run(given, tree, impl), path_by_path(given, tree)) <= 1e-13


@IMPLS
def test_nodes_longer_than_a_block_of_the_kernels_are_exact(impl: TreeImpl) -> None:
    tree = forest((800, [(530, leaves(3, 200)), (40, [])]), (300, leaves(35, 220)))  # blocks: 32 to 512 rows
    given = problem(tree, heads=2, groups=1, width=4)
    assert worst(run(given, tree, impl), path_by_path(given, tree)) <= 1e-12


@IMPLS
def test_the_scale_is_the_callers(impl: TreeImpl) -> None:
    given = problem(FOUR_LEVELS)
    expected = path_by_path(given, FOUR_LEVELS, scale=0.7)
    assert worst(run(given, FOUR_LEVELS, impl, scale=0.7), expected) <= 1e-13
    assert worst(run(given, FOUR_LEVELS, impl), expected) > 1e-2


@IMPLS
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)], ids=str
)
def test_narrow_dtypes_round_and_no_more(impl: TreeImpl, dtype: torch.dtype, tolerance: float) -> None:
    given = problem(FOUR_LEVELS, dtype=dtype)
    exact = given.changed(lambda x: x.double())
    found = run(given, FOUR_LEVELS, impl)
    assert all(tensor.dtype == dtype for tensor in found)
    for ours, true in zip(found, path_by_path(exact, FOUR_LEVELS), strict=True):
        assert (ours.double() - true).norm() <= tolerance * true.norm()


def test_two_runs_are_equal_bit_for_bit() -> None:
    given = problem(THREE_GROUPS, dtype=torch.float32)
    first, second = (run(given, THREE_GROUPS, "cascade") for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


# What goes wrong when one thing is left out.


def merged_through_autograd(given: Problem, tree: AttentionTree, *, with_gradient: bool) -> tuple[Tensor, ...]:
    """The cascade's calls merged by autograd; flash operators drop the gradient of their log-sum-exp."""
    query, key, value = given.operands
    repeats = query.shape[1] // key.shape[1]
    parts: list[tuple[Tensor, Tensor]] = []
    for launch in HostOperators().launches(tree, query.device):
        q = query[:, :, launch.queries]
        k, v = (operand[:, :, launch.keys].repeat_interleave(repeats, dim=1) for operand in (key, value))
        scores = q @ k.transpose(-1, -2) * query.shape[-1] ** -0.5
        if launch.own:
            scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
        lse = scores.logsumexp(-1, keepdim=True)
        rows = torch.arange(tree.rows)[launch.queries]
        empty = lse.new_full((*query.shape[:3], 1), -torch.inf)
        lse = empty.index_copy(2, rows, lse if with_gradient else lse.detach())
        parts.append((torch.zeros_like(query).index_copy(2, rows, scores.softmax(-1) @ v), lse))
    total = torch.stack([lse for _, lse in parts]).logsumexp(0)
    out = sum((part * (lse - total).exp() for part, lse in parts), torch.zeros_like(query))
    return out.detach(), *torch.autograd.grad(out, given.operands, given.upstream_of_rows(tree))


@pytest.mark.parametrize("tree", [GROUP_OF_8, FOUR_LEVELS, THREE_GROUPS])
def test_without_the_gradient_of_the_log_sum_exp_only_the_output_is_right(tree: AttentionTree) -> None:
    given = problem(tree)
    out, dq, dk, _ = path_by_path(given, tree)
    assert worst(merged_through_autograd(given, tree, with_gradient=True), path_by_path(given, tree)) <= 1e-13
    wrong = merged_through_autograd(given, tree, with_gradient=False)
    assert worst(wrong[:1], (out,)) <= 1e-14
    assert worst(wrong[1:2], (dq,)) > 1e-1 and worst(wrong[2:3], (dk,)) > 1e-1
    assert worst(run(given, tree, "cascade"), path_by_path(given, tree)) <= 1e-13


def test_calls_with_their_own_statistics_give_wrong_gradients() -> None:
    given = problem(FOUR_LEVELS)
    out = cascade.cascade(*given.operands, FOUR_LEVELS, given.query.shape[-1] ** -0.5, OwnStatistics())
    grads = torch.autograd.grad(out, given.operands, given.upstream_of_rows(FOUR_LEVELS))
    expected = path_by_path(given, FOUR_LEVELS)
    assert worst([out], expected[:1]) <= 1e-13
    assert min(worst([ours], [true]) for ours, true in zip(grads, expected[1:], strict=True)) > 1e-1


def test_a_plain_causal_mask_over_the_pack_is_wrong() -> None:
    given = problem(GROUP_OF_8)
    causal = torch.ones(GROUP_OF_8.rows, GROUP_OF_8.rows, dtype=torch.bool).tril()
    out = plain_attention(*given.operands, causal)
    grads = torch.autograd.grad(out, given.operands, given.upstream_of_rows(GROUP_OF_8))
    for wrong, true in zip((out, *grads), path_by_path(given, GROUP_OF_8), strict=True):
        assert worst([wrong], [true]) > 1e-1


# Beside autograd, checkpointing, autocast and torch.compile.


@IMPLS
@pytest.mark.parametrize("needed", [[0], [1], [2], [0, 2], [1, 2]])
def test_gradients_may_be_needed_in_part(needed: list[int], impl: TreeImpl) -> None:
    given = problem(THREE_GROUPS)
    expected = path_by_path(given, THREE_GROUPS)
    operands = [operand.detach().requires_grad_(number in needed) for number, operand in enumerate(given.operands)]
    prefix_attention(*operands, THREE_GROUPS, impl=impl).backward(given.upstream_of_rows(THREE_GROUPS))
    for number, operand in enumerate(operands):
        assert (operand.grad is None) == (number not in needed)
        if operand.grad is not None:
            assert worst([operand.grad], [expected[1 + number]]) <= 1e-13


def saved_by(call) -> list[Tensor]:  # type: ignore[no-untyped-def]
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return saved


def test_nothing_is_saved_where_no_gradient_is_needed() -> None:
    given = problem(THREE_GROUPS)
    with torch.no_grad():
        assert saved_by(lambda: prefix_attention(*given.operands, THREE_GROUPS)) == []
    assert saved_by(lambda: prefix_attention(*(x.detach() for x in given.operands), THREE_GROUPS)) == []


def test_what_is_saved_is_operands_output_and_one_number_a_row_and_head() -> None:
    given = problem(THREE_GROUPS)
    saved = saved_by(lambda: prefix_attention(*given.operands, THREE_GROUPS, impl="cascade"))
    rows = THREE_GROUPS.rows
    assert sorted(tensor.numel() for tensor in saved) == sorted([6 * rows, *[2 * rows * 8] * 2, *[6 * rows * 8] * 2])


@IMPLS
def test_checkpointing_changes_nothing(impl: TreeImpl) -> None:
    given = problem(FOUR_LEVELS)

    def layer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return prefix_attention(query.sin(), key, value, FOUR_LEVELS, impl=impl).cos()

    plain = torch.autograd.grad(layer(*given.operands).sum(), given.operands)
    repeated = torch.autograd.grad(checkpoint(layer, *given.operands, use_reentrant=False).sum(), given.operands)
    assert all(torch.equal(one, other) for one, other in zip(plain, repeated, strict=True))


def test_the_first_call_may_stand_inside_a_checkpoint() -> None:
    cascade_fault.cache_clear()  # the self-test runs again
    given = problem(FOUR_LEVELS)
    out = checkpoint(lambda *x: prefix_attention(*x, FOUR_LEVELS, impl="cascade"), *given.operands, use_reentrant=False)
    grads = torch.autograd.grad(out, given.operands, given.upstream_of_rows(FOUR_LEVELS))
    assert worst(grads, path_by_path(given, FOUR_LEVELS)[1:]) <= 1e-13


@IMPLS
def test_a_gradient_without_strides_is_read_right(impl: TreeImpl) -> None:
    given = problem(GROUP_OF_8)
    out = prefix_attention(*given.operands, GROUP_OF_8, impl=impl)
    summed = torch.autograd.grad(out.sum(), given.operands, retain_graph=True)  # an expanded 1
    assert worst(summed, torch.autograd.grad(out, given.operands, torch.ones_like(out))) == 0


@IMPLS
def test_operands_of_any_layout_are_read_right(impl: TreeImpl) -> None:
    given = problem(THREE_GROUPS)
    for change in (lambda x: x.contiguous(), lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2)):
        assert worst(run(given.changed(change), THREE_GROUPS, impl), path_by_path(given, THREE_GROUPS)) <= 1e-13


@IMPLS
def test_the_output_lies_as_transformers_wants_it(impl: TreeImpl) -> None:
    assert prefix_attention(*problem(FOUR_LEVELS).operands, FOUR_LEVELS, impl=impl).transpose(1, 2).is_contiguous()


@IMPLS
def test_a_tree_first_seen_under_inference_mode_trains_later(impl: TreeImpl) -> None:
    tree = random_forest(5)
    given = problem(tree)
    with torch.inference_mode():
        prefix_attention(*given.operands, tree, impl=impl)
    assert worst(run(given, tree, impl), path_by_path(given, tree)) <= 1e-13


@IMPLS
def test_autocast_narrows_as_it_does_for_stock_attention(impl: TreeImpl) -> None:
    given = problem(THREE_GROUPS, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = prefix_attention(given.query, given.key, given.value.bfloat16(), THREE_GROUPS, impl=impl)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out, given.operands, given.upstream_of_rows(THREE_GROUPS).bfloat16())
    for ours, true in zip((out, *grads), path_by_path(given, THREE_GROUPS), strict=True):
        assert (ours - true).norm() <= 3e-2 * true.norm()


def test_a_compiled_caller_breaks_its_graph_and_goes_on() -> None:
    given = problem(THREE_GROUPS)
    compiled = torch.compile(lambda q, k, v: prefix_attention(q + 1, k, v, THREE_GROUPS) * 2, backend="eager")
    expected = 2 * prefix_attention(given.query + 1, given.key, given.value, THREE_GROUPS)
    assert torch.equal(compiled(*given.operands), expected)
