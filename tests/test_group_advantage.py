"""Group-relative advantages: what holds for every implementation in the default mode, and at the boundary.

The other modes are in ``test_group_advantage_modes``.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arft_fast.kernels import group_advantage, group_advantage_impl, native, triton_support

from .group_advantage_by_hand import CPU_IMPLS, IMPLS, NAN, advantages_by_hand, close, run


def by_hand(groups, **options):
    """The definition on groups of rewards."""
    return advantages_by_hand([[r] for group in groups for r in group], [len(group) for group in groups], **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("size", [1, 2, 63, 257])
def test_equals_the_definition(impl, scale, size):
    rewards = torch.randn(3 * size, generator=torch.Generator().manual_seed(size))
    result = run(rewards, size, scale=scale, impl=impl)
    close(result.advantages, by_hand(rewards.view(3, size).tolist(), scale=scale), 2e-5)
    close(result.mean, rewards.view(3, size).mean(1))


@pytest.mark.parametrize("impl", IMPLS)
def test_groups_of_any_size_are_given_by_offsets(impl):
    rewards = torch.tensor([1.0, 0.0, 3.0, 5.0, 5.0, 7.0])
    result = run(rewards, torch.tensor([0, 2, 2, 3, 6]), impl=impl)
    close(result.advantages, by_hand([[1, 0], [], [3], [5, 5, 7]]))
    assert result.no_signal.tolist() == [False, True, True, False]
    assert result.std[:3].tolist() == [pytest.approx(math.sqrt(0.5)), 0.0, 0.0]
    assert result.mean.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("impl", IMPLS)
def test_int32_offsets_mean_the_same_as_a_size(impl):
    rewards = torch.randn(6)
    by_offsets = run(rewards, torch.tensor([0, 3, 6], dtype=torch.int32), impl=impl)
    assert torch.equal(by_offsets.advantages, run(rewards, 3, impl=impl).advantages)


def test_the_std_has_ddof_one():
    rewards = torch.tensor([0.0, 0.0, 1.0, 2.0])
    biased = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-4)
    assert (group_advantage(rewards, 4).advantages - biased).abs().max() > 0.1


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-30, 123456.789])
@pytest.mark.parametrize("size", [3, 7, 63])
def test_a_constant_group_gets_exactly_zero(impl, value, size):
    result = run(torch.full((size,), value), size, impl=impl)
    assert torch.equal(result.advantages, torch.zeros(size))
    assert result.std.item() == 0.0 and result.no_signal.item()
    assert result.mean.item() == torch.tensor(value).item()


@pytest.mark.parametrize("impl", ["reference", IMPLS[2]])
@pytest.mark.parametrize("size", [3, 7, 63])
def test_a_constant_float64_group_gets_exactly_zero(impl, size):
    rewards = torch.full((size,), 0.1, dtype=torch.float64)
    result = run(rewards, size, impl=impl)
    assert torch.equal(result.advantages, torch.zeros_like(rewards)) and torch.equal(result.mean, rewards[:1])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_large_common_offset_costs_no_precision(impl):
    rewards = 1e4 + torch.tensor([0.0, 1.0, 2.0, 5.0]) * 2**-10  # exact in float32, and squares would cancel
    close(run(rewards, 4, impl=impl).advantages, by_hand([rewards.tolist()]), 1e-6)


def test_without_care_a_constant_group_would_get_a_gradient():
    rewards = torch.full((7,), 123456.789)
    naive = (rewards - rewards.sum() / 7) / (rewards.std() + 1e-4)
    assert (naive != 0).any()


@pytest.mark.parametrize("impl", IMPLS)
def test_components_that_add_up_to_the_same_tie(impl):
    weights = torch.tensor([0.1, 0.2, 0.3])
    rewards = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert run(rewards, 2, weights=weights, impl=impl).no_signal.item()


def test_weights_of_another_dtype_are_read_alike():
    rewards, weights = torch.randn(6, 2), torch.tensor([0.1, 0.7], dtype=torch.float64)
    results = [
        group_advantage(rewards, 3, weights=w, impl=i)
        for w in (weights, weights.float())
        for i in ("auto", "reference")
    ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_masked_trajectory_leaves_no_trace_in_its_group(impl, scale):
    rewards = torch.tensor([[1.0, 0.5], [NAN, NAN], [0.0, 1.0], [2.0, 0.0]])
    masked = run(rewards, 4, scale=scale, impl=impl)
    without = run(rewards[[0, 2, 3]], 3, scale=scale, impl=impl)
    assert masked.advantages[1].item() == 0.0
    assert torch.equal(masked.advantages[[0, 2, 3]], without.advantages)
    assert torch.equal(masked.mean, without.mean) and torch.equal(masked.std, without.std)


@pytest.mark.parametrize("impl", IMPLS)
def test_scoring_a_masked_trajectory_zero_would_differ(impl):
    masked = run(torch.tensor([1.0, NAN, 0.5]), 3, impl=impl).advantages
    scored = run(torch.tensor([1.0, 0.0, 0.5]), 3, impl=impl).advantages
    assert (masked - scored).abs().max() > 0.1


@pytest.mark.parametrize("impl", IMPLS)
def test_a_component_that_does_not_apply_counts_zero(impl):
    weights = torch.tensor([2.0, 0.5])
    rewards = torch.tensor([[1.0, NAN], [NAN, 3.0], [0.25, 1.0]])
    result = run(rewards, 3, weights=weights, impl=impl)
    close(result.advantages, by_hand([[2.0, 1.5, 1.0]]))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_group_of_masked_trajectories_has_no_mean_and_no_signal(impl):
    result = run(torch.tensor([NAN, NAN, 1.0, 0.0]), 2, impl=impl)
    assert result.mean.isnan().tolist() == [True, False]
    assert result.no_signal.tolist() == [True, False]
    assert result.advantages[:2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rewards_give_empty_results(impl):
    result = run(torch.empty(0, 2), 8, impl=impl)
    assert [len(part) for part in result] == [0, 0, 0, 0]


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_rewards_are_read_right(impl):
    table = torch.randn(2, 8)
    strided = run(table.T, 4, impl=impl).advantages
    assert torch.equal(strided, run(table.T.contiguous(), 4, impl=impl).advantages)


@pytest.mark.skipif(not native.available(), reason="not built")
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_native_equals_the_reference(data):
    """Identical zeros, and every other value within float32 rounding."""
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    value = st.floats(-100, 100, width=32) | st.just(NAN) | st.sampled_from([0.0, 0.1, 1.0])
    rows, components = sum(lengths), data.draw(st.integers(1, 3))
    cells = data.draw(st.lists(value, min_size=rows * components, max_size=rows * components))
    weights = data.draw(st.none() | st.lists(st.floats(-2, 2, width=32), min_size=components, max_size=components))
    arguments = {
        "groups": torch.tensor([0, *lengths]).cumsum(0),
        "weights": None if weights is None else torch.tensor(weights),
        "scale": data.draw(st.sampled_from(["group", "batch", "none"])),
    }
    rewards = torch.tensor(cells).view(rows, components)
    fast = group_advantage(rewards, impl="native", **arguments)
    slow = group_advantage(rewards, impl="reference", **arguments)
    assert torch.equal(fast.no_signal, slow.no_signal)
    for name in ("advantages", "mean", "std"):
        torch.testing.assert_close(getattr(fast, name), getattr(slow, name), rtol=1e-6, atol=1e-7, equal_nan=True)


def test_float64_rewards_keep_their_precision():
    rewards = torch.randn(8, dtype=torch.float64)
    result = group_advantage(rewards, 4)
    assert result.advantages.dtype == torch.float64
    close(result.advantages, by_hand(rewards.view(2, 4).tolist()), 1e-12)


def test_auto_is_native_where_it_is_built():
    expected = "native" if native.available() else "reference"
    assert group_advantage_impl(torch.zeros(2)) == expected
    assert group_advantage_impl(torch.zeros(2, dtype=torch.float64)) == "reference"


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(triton_support, "available", lambda device: False)
    with pytest.raises(RuntimeError, match=r"impl: 'triton' cannot run on cpu .* pass 'auto' or 'reference'"):
        group_advantage(torch.zeros(2), 2, impl="triton")


@pytest.mark.parametrize("impl", IMPLS)
def test_no_gradient_flows_through_rewards_or_weights(impl):
    rewards, weights = torch.randn(4, 2, requires_grad=True), torch.ones(2, requires_grad=True)
    assert not any(part.requires_grad for part in run(rewards, 4, weights=weights, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_keeps_its_contract(impl, dtype):
    if impl == "triton" and torch.cuda.is_available():
        pytest.skip("the operator is called on the CPU here")
    operator = torch.ops.arft_fast.group_advantage.default
    rewards, offsets, weights = torch.randn(6, 2).to(dtype), torch.tensor([0, 2, 6]), torch.ones(2)
    rule = ([-1, 0], [0.0, 0.5], "mean", "batch", "normalize_then_sum", True, 0.0, 1e-4)
    torch.library.opcheck(operator, (rewards, offsets, weights, *rule, impl))


@pytest.mark.parametrize("groups", [3, torch.tensor([0, 2, 6])])
def test_it_compiles_into_one_graph(groups):
    def scaled(rewards, weights):
        return group_advantage(2 * rewards, groups, weights=weights, gates={1: (0, 0.5)}, order="normalize_then_sum")

    torch.compiler.reset()
    rewards, weights = torch.randn(6, 2), torch.tensor([1.0, 0.5])
    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(rewards, weights), scaled(rewards, weights), strict=True):
        assert torch.equal(ours, expected)


def test_the_compiled_graph_holds_the_operator():
    """Negative control of the test above: what is compiled is the operator, not a graph of its pieces."""
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compiler.reset()
    torch.compile(lambda rewards: group_advantage(rewards, 3).advantages, fullgraph=True, backend=backend)(ROWS)
    assert sum("arft_fast.group_advantage" in target for target in seen) == 1


ROWS, TABLE = torch.zeros(6), torch.zeros(6, 2)
BAD = [
    ([1.0], 1, {}, TypeError, "rewards: expected a torch.Tensor"),
    (torch.zeros(6, dtype=torch.int64), 3, {}, TypeError, "rewards: expected a floating dtype"),
    (torch.zeros(2, 3, 4), 1, {}, ValueError, r"rewards: expected shape \[B, K\]"),
    (torch.zeros(6, 0), 3, {}, ValueError, "rewards: has no component"),
    (torch.tensor([math.inf, 0.0]), 2, {}, ValueError, "rewards: holds an infinite value"),
    (ROWS, 4, {}, ValueError, "groups: 6 rewards do not divide into groups of 4"),
    (ROWS, 0, {}, ValueError, "groups: must be > 0"),
    (ROWS, True, {}, TypeError, "groups: expected an int"),
    (ROWS, torch.tensor([0.0, 6.0]), {}, TypeError, "groups: expected a integer dtype"),
    (ROWS, torch.tensor([0, 3]), {}, ValueError, "groups: must start at 0 and end at B=6"),
    (ROWS, torch.tensor([1, 6]), {}, ValueError, "groups: must start at 0 and end at B=6"),
    (ROWS, torch.tensor([0, 4, 2, 6]), {}, ValueError, "groups: must not decrease"),
    (ROWS, torch.empty(0, dtype=torch.int64), {}, ValueError, "groups: is empty"),
    (ROWS, 3, {"weights": torch.ones(1)}, ValueError, r"weights: rewards \[B\] have no components"),
    (ROWS[:, None], 3, {"weights": torch.ones(2)}, ValueError, r"weights: expected shape \[K\] with K=1"),
    (ROWS[:, None], 3, {"weights": torch.tensor([NAN])}, ValueError, "weights: row 0 is not finite"),
    (TABLE, 3, {"gates": [(1, 0, 0.5)]}, TypeError, r"gates: expected a mapping {k: \(by, threshold\)}"),
    (TABLE, 3, {"gates": {1: 0.5}}, TypeError, r"gates: expected \(by, threshold\) for component 1, got 0.5"),
    (TABLE, 3, {"gates": {1: (0, 0.5, 1)}}, TypeError, r"gates: expected \(by, threshold\)"),
    (TABLE, 3, {"gates": {"format": (0, 0.5)}}, TypeError, "gates: components are given by their index, got 'format'"),
    (TABLE, 3, {"gates": {2: (0, 0.5)}}, ValueError, r"gates: no component 2; rewards have K=2: 0 \.\. 1"),
    (TABLE, 3, {"gates": {1: (-1, 0.5)}}, ValueError, "gates: no component -1"),
    (TABLE, 3, {"gates": {1: (0, "1")}}, TypeError, "gates: expected a number as threshold of component 1"),
    (TABLE, 3, {"gates": {1: (0, NAN)}}, ValueError, "gates: the threshold of component 1 must be finite"),
    (TABLE, 3, {"gates": {1: (0, -math.inf)}}, ValueError, "must be finite, got -inf; leave it out"),
    (ROWS, 3, {"gates": {0: (0, 0.5)}}, ValueError, r"gates: rewards \[B\] have no components"),
    (ROWS, 3, {"center": "median"}, ValueError, "center: must be one of 'mean', 'leave_one_out', 'none'"),
    (ROWS, 3, {"order": "sum"}, ValueError, "order: must be one of 'sum_then_normalize', 'normalize_then_sum'"),
    (ROWS, 3, {"whiten": "batch"}, TypeError, "whiten: expected True, False or None, got str"),
    (ROWS, 3, {"std_floor": -0.1}, ValueError, "std_floor: must be finite and >= 0"),
    (ROWS, 3, {"scale": "sequence"}, ValueError, "scale: must be one of 'group', 'batch', 'none'"),
    (ROWS, 3, {"epsilon": 0.0}, ValueError, "epsilon: must be finite and > 0"),
    (ROWS, 3, {"epsilon": "1"}, TypeError, "epsilon: expected a number"),
    (ROWS, 3, {"impl": "fused"}, ValueError, "impl: must be one of"),
    (ROWS.double(), 3, {"impl": "native"}, ValueError, "impl: 'native' takes float32 rewards on a CPU"),
    (ROWS.to("meta"), 3, {"impl": "native"}, ValueError, "impl: 'native' takes float32 rewards on a CPU"),
]


@pytest.mark.parametrize(("rewards", "groups", "options", "error", "message"), BAD)
def test_a_bad_argument_is_named_with_its_remedy(rewards, groups, options, error, message):
    with pytest.raises(error, match=message):
        group_advantage(rewards, groups, **options)


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("center", ["mean", "none"])
def test_a_weighted_sum_that_overflows_is_refused(impl, center):
    rewards = torch.full((2, 1), 3e38)
    with pytest.raises(ValueError, match="overflows"):
        run(rewards, 2, weights=torch.tensor([10.0]), center=center, impl=impl)
