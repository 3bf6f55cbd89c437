"""Which implementation of attention over a forest runs, what the self-test sees, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from arft_fast.kernels import flash_operators, prefix_attention, tree_impl
from arft_fast.kernels.flash_operators import HostOperators
from arft_fast.kernels.prefix_attention import TOLERANCE, cascade_fault, self_test
from tests.attention_forests import (
    THREE_GROUPS,
    DroppedGradient,
    OwnStatistics,
    forest,
    leaves,
    path_by_path,
    problem,
    random_forest,
    worst,
)

AUTO = sys.modules["arft_fast.kernels.prefix_attention"]._auto  # the package has a function of the module's name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_auto_is_the_cascade_on_a_cpu(dtype: torch.dtype) -> None:
    assert tree_impl(torch.zeros(1, 2, 3, 8, dtype=dtype)) == "cascade"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("width", [8, 64, 128])
def test_the_self_test_leaves_room_below_and_sees_what_is_wrong(dtype: torch.dtype, width: int) -> None:
    device, limit = torch.device("cpu"), TOLERANCE[dtype]
    assert max(self_test(HostOperators(), device, dtype, width).values()) < limit / 2
    for wrong in (OwnStatistics(), DroppedGradient()):
        errors = self_test(wrong, device, dtype, width)
        assert errors["output"] < limit / 2 and errors["dq"] > 20 * limit and errors["dk"] > 20 * limit


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[object], None]]:
    """Put other operators in place; what was found out about this machine is forgotten before and afterwards."""

    def forget() -> None:
        cascade_fault.cache_clear()
        AUTO.cache_clear()

    forget()
    yield lambda operators: monkeypatch.setattr(flash_operators, "operators", lambda device_type: operators)
    forget()


class MissingOperators(HostOperators):
    def backward(self, *arguments):  # type: ignore[no-untyped-def]
        return torch.ops.aten._an_operator_of_another_torch(*arguments)


class NoMemory(HostOperators):
    def forward(self, *arguments):  # type: ignore[no-untyped-def]
        raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize(
    ("operators", "reason"),
    [
        (OwnStatistics(), "self-test is off by dq .*, dk .*, dv"),
        (MissingOperators(), "AttributeError in the self-test"),
    ],
)
def test_auto_is_dense_and_says_so_once_where_the_self_test_fails(
    operators: object, reason: str, flash: Callable[[object], None]
) -> None:
    flash(operators)
    given = problem(THREE_GROUPS)
    with pytest.warns(UserWarning, match=f"'dense' runs instead of 'cascade' .*{reason}") as caught:
        out, _ = (prefix_attention(*given.operands, THREE_GROUPS) for _ in range(2))
    assert len(caught) == 1 and tree_impl(given.query) == "dense"
    grads = torch.autograd.grad(out, given.operands, given.upstream_of_rows(THREE_GROUPS))
    assert worst((out, *grads), path_by_path(given, THREE_GROUPS)) <= 1e-13
    with pytest.raises(RuntimeError, match=f"impl: 'cascade' cannot run here .*{reason}.*; pass 'auto' or 'dense'"):
        prefix_attention(*given.operands, THREE_GROUPS, impl="cascade")


def test_a_lack_of_memory_says_nothing_about_the_operators(flash: Callable[[object], None]) -> None:
    flash(NoMemory())
    query = torch.zeros(1, 2, 3, 8)
    with pytest.raises(torch.OutOfMemoryError):
        tree_impl(query)
    flash(HostOperators())
    assert tree_impl(query) == "cascade"


def test_a_device_without_flash_operators_is_dense(flash: Callable[[object], None]) -> None:
    given = problem(THREE_GROUPS).changed(lambda x: x.to("meta"))
    with pytest.warns(UserWarning, match="torch has no flash operators for meta"):
        assert prefix_attention(*given.operands, THREE_GROUPS).shape == given.query.shape
    assert tree_impl(given.query) == "dense"


def test_the_self_test_runs_under_any_default_device_and_dtype() -> None:
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            errors = self_test(HostOperators(), torch.device("cpu"), torch.float32, 16, random_forest(3))
    finally:
        torch.set_default_dtype(torch.float32)
    assert max(errors.values()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 64), (torch.bfloat16, 60), (torch.float16, 264)])
def test_what_flash_attention_on_cuda_does_not_take_is_known_without_a_device(dtype: torch.dtype, width: int) -> None:
    fault = cascade_fault(torch.device("cuda", 0), dtype, width)
    assert fault is not None and f"got {dtype} of width {width}" in fault


# What is refused.

EXAMPLE = {"query": torch.zeros(1, 4, 5, 8), "key": torch.zeros(1, 2, 5, 8), "value": torch.zeros(1, 2, 5, 8)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": torch.zeros(4, 5, 8)}, ValueError, r"query: expected shape \[1, H, S, d\], got \[4, 5, 8\]"),
        ({"query": torch.zeros(1, 4, 6, 8)}, ValueError, r"key: expected shape .* with S=6 \(from query\)"),
        ({"value": torch.zeros(1, 2, 5, 4)}, ValueError, r"value: expected shape .* with d=8 \(from query\)"),
        ({"value": torch.zeros(1, 4, 5, 8)}, ValueError, r"value: expected shape .* with H_kv=2 \(from key\)"),
        ({"query": torch.zeros(1, 3, 5, 8)}, ValueError, "query: its 3 heads must be a multiple of the 2 heads of key"),
        (
            {name: x.expand(2, -1, -1, -1) for name, x in EXAMPLE.items()},
            ValueError,
            "query: expected one packed forest",
        ),
        ({"tree": forest((6, []))}, ValueError, "tree: has 6 rows but query 5; pass the tree that packed the rows"),
        ({"tree": torch.ones(5, 5)}, TypeError, "tree: expected an AttentionTree, got Tensor"),
        ({"query": torch.zeros(1, 4, 5, 8).long()}, TypeError, "query: expected a floating dtype"),
        ({"key": torch.zeros(1, 2, 5, 8).half()}, TypeError, "key, value: must be torch.float32 as query is"),
        ({"key": torch.zeros(1, 2, 5, 8, device="meta")}, ValueError, "key: is on meta but query on cpu"),
        ({"scale": float("nan")}, ValueError, "scale: must be finite and > 0, got nan"),
        ({"impl": "flash"}, ValueError, "impl: must be one of 'auto', 'cascade', 'dense', got 'flash'"),
    ],
)
def test_bad_arguments_are_refused_with_their_name(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        prefix_attention(**{**EXAMPLE, "tree": forest((2, leaves(1, 2))), **changes})
