"""The cascade's route on CUDA: without a device over operators written out here, with one over the real ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from arft_fast.kernels import cascade, prefix_attention, tree_impl
from arft_fast.kernels.attention_tree import AttentionTree
from arft_fast.kernels.flash_operators import Operators, VarlenOperators
from arft_fast.kernels.prefix_attention import TOLERANCE, self_test
from tests.attention_forests import (
    FORESTS,
    FOUR_LEVELS,
    THREE_GROUPS,
    Problem,
    forest,
    leaves,
    path_by_path,
    problem,
    random_forest,
    worst,
)

TREES = pytest.mark.parametrize("tree", FORESTS.values(), ids=FORESTS)
SINGLE_ROWS = forest((1, leaves(1)), (1, [(1, leaves(1))]))  # no query segment longer than 1


class Emulated:
    """``aten::_flash_attention_forward`` and ``_backward`` over segments, as plainly as can be; counts its calls.

    It holds callers to what the real ones need and do not check.
    """

    def __init__(self, *, own_statistics: bool = False) -> None:
        self.forwards = self.backwards = 0
        self._own_statistics = own_statistics

    def operators(self) -> VarlenOperators:
        return VarlenOperators(self.forward, self.backward)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cum_seq_q: Tensor,
        cum_seq_k: Tensor,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        return_debug_mask: bool,
        *,
        scale: float | None = None,
    ) -> tuple[Any, ...]:
        assert dropout_p == 0 and not return_debug_mask and scale is not None
        self.forwards += 1
        out = torch.full(query.shape, torch.nan, dtype=query.dtype)
        lse = out.new_full(
            (query.shape[1], query.shape[0]), torch.nan, dtype=torch.promote_types(out.dtype, torch.float32)
        )
        for q, k in self._segments(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, is_causal):
            scores = self._scores(query[q], key[k], is_causal, scale)
            lse[:, q] = scores.logsumexp(-1).to(lse.dtype)
            out[q] = torch.einsum("hij,jhd->ihd", scores.softmax(-1), self._repeated(value[k], query)).to(out.dtype)
        return out, lse, torch.empty(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)

    def backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        cum_seq_q: Tensor,
        cum_seq_k: Tensor,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        rng_state: Tensor,
        unused: Tensor,
        *,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert dropout_p == 0 and scale is not None
        assert rng_state.dtype == torch.uint64 and rng_state.shape == (2,) and unused.numel() == 0
        assert logsumexp.shape == (query.shape[1], query.shape[0]) and logsumexp.is_contiguous()
        assert logsumexp.dtype == torch.promote_types(query.dtype, torch.float32)
        assert grad_out.dtype == out.dtype == query.dtype and grad_out.shape == out.shape == query.shape
        self.backwards += 1
        if self._own_statistics:
            segments = cum_seq_q, cum_seq_k, max_q, max_k
            out, logsumexp, *_ = self.forward(query, key, value, *segments, 0.0, is_causal, False, scale=scale)
        dtype, wide = query.dtype, logsumexp.dtype
        grad_out, query, key, value, out = (operand.to(wide) for operand in (grad_out, query, key, value, out))
        grads = [torch.full_like(operand, torch.nan) for operand in (query, key, value)]
        repeats = query.shape[1] // key.shape[1]
        for q, k in self._segments(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, is_causal):
            shares = (self._scores(query[q], key[k], is_causal, scale) - logsumexp[:, q, None]).exp()
            of_shares = torch.einsum("ihd,jhd->hij", grad_out[q], self._repeated(value[k], query))
            of_scores = shares * (of_shares - (grad_out[q] * out[q]).sum(-1).t()[..., None]) * scale
            grads[0][q] = torch.einsum("hij,jhd->ihd", of_scores, self._repeated(key[k], query))
            for grad, left, right in ((grads[1], of_scores, query[q]), (grads[2], shares, grad_out[q])):
                grad[k] = torch.einsum("hij,ihd->jhd", left, right).unflatten(1, (-1, repeats)).sum(2)
        return grads[0].to(dtype), grads[1].to(dtype), grads[2].to(dtype)

    @staticmethod
    def _segments(
        query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool
    ) -> list[tuple[slice, slice]]:
        assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        assert cu_q.dtype == cu_k.dtype == torch.int32 and len(cu_q) == len(cu_k)
        for offsets, rows, longest in ((cu_q, len(query), max_q), (cu_k, len(key), max_k)):
            assert offsets[0] == 0 and offsets[-1] == rows and 1 <= offsets.diff().min()
            assert offsets.diff().max() <= longest
        assert not causal or torch.equal(cu_q, cu_k)
        assert max_q > 1, "grouped heads would go another way"
        q, k = ([slice(*pair) for pair in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)] for cu in (cu_q, cu_k))
        return list(zip(q, k, strict=True))

    @staticmethod
    def _repeated(operand: Tensor, query: Tensor) -> Tensor:
        return operand.repeat_interleave(query.shape[1] // operand.shape[1], dim=1)

    def _scores(self, query: Tensor, key: Tensor, is_causal: bool, scale: float) -> Tensor:
        scores = torch.einsum("ihd,jhd->hij", query, self._repeated(key, query)) * scale
        if is_causal:
            scores = scores.masked_fill(~torch.ones(scores.shape[1:], dtype=torch.bool).tril(), -torch.inf)
        return scores


def run(given: Problem, tree: AttentionTree, flash: Operators) -> tuple[Tensor, ...]:
    out = cascade.cascade(*given.operands, tree, given.query.shape[-1] ** -0.5, flash)
    return out.detach(), *torch.autograd.grad(out, given.operands, given.upstream_of_rows(tree))


@TREES
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (6, 2)])
def test_output_and_gradients_are_those_of_each_path(tree: AttentionTree, heads: int, groups: int) -> None:
    given = problem(tree, heads, groups)
    assert worst(run(given, tree, Emulated().operators()), path_by_path(given, tree)) <= 1e-13


@pytest.mark.parametrize("tree", [*(random_forest(seed) for seed in range(12)), SINGLE_ROWS])
def test_random_forests_are_exact(tree: AttentionTree) -> None:
    given = problem(tree, heads=4, groups=2)
    assert worst(run(given, tree, Emulated().operators()), path_by_path(given, tree)) <= 1e-13


def test_calls_with_their_own_statistics_give_wrong_gradients() -> None:
    given = problem(FOUR_LEVELS)
    found = run(given, FOUR_LEVELS, Emulated(own_statistics=True).operators())
    expected = path_by_path(given, FOUR_LEVELS)
    assert worst(found[:1], expected[:1]) <= 1e-13
    assert min(worst([ours], [true]) for ours, true in zip(found[1:], expected[1:], strict=True)) > 1e-1


@TREES
def test_there_is_one_call_for_all_nodes_and_one_a_level(tree: AttentionTree) -> None:
    emulated = Emulated()
    run(problem(tree), tree, emulated.operators())
    assert emulated.forwards == emulated.backwards == 1 + len(tree.levels)


def test_a_level_of_one_node_copies_no_rows() -> None:
    for tree, copied in ((FORESTS["group_of_8"], False), (THREE_GROUPS, True)):
        launch = VarlenOperators().launches(tree, torch.device("cpu"))[1]
        assert isinstance(launch.queries, Tensor) == isinstance(launch.keys, Tensor) == copied


def test_narrow_operands_are_merged_and_summed_in_float32() -> None:
    given = problem(FOUR_LEVELS, dtype=torch.bfloat16)
    errors = self_test(Emulated().operators(), torch.device("cpu"), torch.bfloat16, 64)
    assert max(errors.values()) < TOLERANCE[torch.bfloat16] / 2
    assert all(tensor.dtype == torch.bfloat16 for tensor in run(given, FOUR_LEVELS, Emulated().operators()))


def test_the_index_tensors_of_a_tree_are_made_once_for_a_device() -> None:
    flash, tree = VarlenOperators(), random_forest(2)
    assert flash.launches(tree, torch.device("cpu")) is flash.launches(tree, torch.device("cpu"))


@TREES
def test_the_real_operators_take_these_arguments_and_nobody_reads_a_tensor(tree: AttentionTree) -> None:
    given = problem(tree, dtype=torch.bfloat16)
    query, key, value = given.changed(lambda x: x.to("meta")).operands  # there are no values to read
    out = cascade.cascade(query, key, value, tree, 0.3, VarlenOperators())
    grads = torch.autograd.grad(out, (query, key, value), torch.empty_like(out))
    assert (out.shape, out.dtype) == (given.query.shape, torch.bfloat16)
    assert [(grad.shape, grad.dtype) for grad in grads] == [(x.shape, torch.bfloat16) for x in given.operands]


@TREES
def test_on_a_cuda_device_each_call_returns_what_the_merge_and_the_sums_expect(tree: AttentionTree) -> None:
    tree = AttentionTree(tree.nodes)  # its index tensors will be fake ones
    flash = VarlenOperators()
    with FakeTensorMode():
        device = torch.device("cuda", 0)
        for launch in flash.launches(tree, device):
            length, keys = (
                len(rows) if isinstance(rows, Tensor) else rows.stop - rows.start
                for rows in (launch.queries, launch.keys)
            )
            query = torch.empty(length, 6, 8, dtype=torch.bfloat16, device=device)
            key = torch.empty(keys, 2, 8, dtype=torch.bfloat16, device=device)
            out, lse = flash.forward(query, key, key, launch, 0.3)
            assert (out.shape, out.dtype, out.device) == (query.shape, torch.bfloat16, device)
            assert (lse.shape, lse.dtype, lse.device) == ((6, length), torch.float32, device)
            grads = flash.backward(out, query, key, key, out, lse, launch, 0.3)
            assert [grad.shape for grad in grads] == [query.shape, key.shape, key.shape]


# With a device.

LONG = forest((300, [(70, leaves(129, 1, 40)), (8, [])]), (64, leaves(200, 33)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [32, 64, 128])
def test_the_self_test_passes_on_the_device(dtype: torch.dtype, width: int) -> None:
    assert tree_impl(torch.zeros(1, 4, 3, width, dtype=dtype, device="cuda"), "cascade") == "cascade"
    errors = self_test(VarlenOperators(), torch.device("cuda", 0), dtype, width, LONG)
    print(f"{dtype} width {width}: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    assert max(errors.values()) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("tree", [*FORESTS.values(), LONG, SINGLE_ROWS])
def test_bfloat16_on_the_device_is_float32_masked_attention_rounded(tree: AttentionTree) -> None:
    given = problem(tree, heads=8, groups=2, width=64, dtype=torch.bfloat16).changed(lambda x: x.cuda())
    exact = given.changed(lambda x: x.float())
    upstream = given.upstream_of_rows(tree)
    out = prefix_attention(*given.operands, tree, impl="cascade")
    true = prefix_attention(*exact.operands, tree, impl="dense")
    grads = torch.autograd.grad(out, given.operands, upstream)
    for ours, expected in zip(
        (out, *grads), (true, *torch.autograd.grad(true, exact.operands, upstream.float())), strict=True
    ):
        assert (ours.float() - expected).norm() <= 3e-2 * expected.norm()


@pytest.mark.gpu
def test_nothing_waits_for_the_device_once_the_tree_is_known() -> None:
    given = problem(LONG, heads=8, groups=2, width=64, dtype=torch.bfloat16).changed(lambda x: x.cuda())
    upstream = given.upstream_of_rows(LONG)
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            torch.autograd.grad(prefix_attention(*given.operands, LONG, impl="cascade"), given.operands, upstream)
        finally:
            torch.cuda.set_sync_debug_mode("default")
