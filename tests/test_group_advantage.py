"""Group-relative advantages: both implementations against the definition, spelled out with the statistics module."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arft_fast.kernels import group_advantage, group_advantage_impl, native

NAN = math.nan
IMPLS = ["reference", pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason="not built"))]


def advantages_by_hand(groups, *, scale="group", epsilon=1e-4):
    """The definition on lists of floats, NaN for a row that is left out."""
    everything = [r for group in groups for r in group if not math.isnan(r)]
    out = []
    for group in groups:
        valid = [r for r in group if not math.isnan(r)]
        spread = everything if scale == "batch" else valid
        std = statistics.stdev(spread) if len(spread) > 1 else 0.0
        divisor = 1.0 if scale == "none" else std + epsilon
        out += [0.0 if math.isnan(r) else (r - statistics.fmean(valid)) / divisor for r in group]
    return out


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("size", [1, 2, 63, 257])
def test_equals_the_definition(impl, scale, size):
    rewards = torch.randn(3 * size, generator=torch.Generator().manual_seed(size))
    result = group_advantage(rewards, size, scale=scale, impl=impl)
    close(result.advantages, advantages_by_hand(rewards.view(3, size).tolist(), scale=scale), 2e-5)
    close(result.mean, rewards.view(3, size).mean(1))


@pytest.mark.parametrize("impl", IMPLS)
def test_groups_of_any_size_are_given_by_offsets(impl):
    rewards = torch.tensor([1.0, 0.0, 3.0, 5.0, 5.0, 7.0])
    result = group_advantage(rewards, torch.tensor([0, 2, 2, 3, 6]), impl=impl)
    close(result.advantages, advantages_by_hand([[1, 0], [], [3], [5, 5, 7]]))
    assert result.no_signal.tolist() == [False, True, True, False]
    assert result.std[:3].tolist() == [pytest.approx(math.sqrt(0.5)), 0.0, 0.0]
    assert result.mean.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("impl", IMPLS)
def test_int32_offsets_mean_the_same_as_a_size(impl):
    rewards = torch.randn(6)
    by_offsets = group_advantage(rewards, torch.tensor([0, 3, 6], dtype=torch.int32), impl=impl)
    assert torch.equal(by_offsets.advantages, group_advantage(rewards, 3, impl=impl).advantages)


def test_the_std_has_ddof_one():
    rewards = torch.tensor([0.0, 0.0, 1.0, 2.0])
    biased = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-4)
    assert (group_advantage(rewards, 4).advantages - biased).abs().max() > 0.1


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-30, 123456.789])
@pytest.mark.parametrize("size", [3, 7, 63])
def test_a_constant_group_gets_exactly_zero(impl, value, size):
    result = group_advantage(torch.full((size,), value), size, impl=impl)
    assert torch.equal(result.advantages, torch.zeros(size))
    assert result.std.item() == 0.0 and result.no_signal.item()
    assert result.mean.item() == torch.tensor(value).item()


@pytest.mark.parametrize("size", [3, 7, 63])
def test_a_constant_float64_group_gets_exactly_zero(size):
    rewards = torch.full((size,), 0.1, dtype=torch.float64)
    result = group_advantage(rewards, size)
    assert torch.equal(result.advantages, torch.zeros_like(rewards)) and torch.equal(result.mean, rewards[:1])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_large_common_offset_costs_no_precision(impl):
    rewards = 1e4 + torch.tensor([0.0, 1.0, 2.0, 5.0]) * 2**-10  # exact in float32, and squares would cancel
    close(group_advantage(rewards, 4, impl=impl).advantages, advantages_by_hand([rewards.tolist()]), 1e-6)


def test_without_care_a_constant_group_would_get_a_gradient():
    rewards = torch.full((7,), 123456.789)
    naive = (rewards - rewards.sum() / 7) / (rewards.std() + 1e-4)
    assert (naive != 0).any()


@pytest.mark.parametrize("impl", IMPLS)
def test_components_that_add_up_to_the_same_tie(impl):
    weights = torch.tensor([0.1, 0.2, 0.3])
    rewards = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert group_advantage(rewards, 2, weights=weights, impl=impl).no_signal.item()


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
    masked = group_advantage(rewards, 4, scale=scale, impl=impl)
    without = group_advantage(rewards[[0, 2, 3]], 3, scale=scale, impl=impl)
    assert masked.advantages[1].item() == 0.0
    assert torch.equal(masked.advantages[[0, 2, 3]], without.advantages)
    assert torch.equal(masked.mean, without.mean) and torch.equal(masked.std, without.std)


@pytest.mark.parametrize("impl", IMPLS)
def test_scoring_a_masked_trajectory_zero_would_differ(impl):
    masked = group_advantage(torch.tensor([1.0, NAN, 0.5]), 3, impl=impl).advantages
    scored = group_advantage(torch.tensor([1.0, 0.0, 0.5]), 3, impl=impl).advantages
    assert (masked - scored).abs().max() > 0.1


@pytest.mark.parametrize("impl", IMPLS)
def test_a_component_that_does_not_apply_counts_zero(impl):
    weights = torch.tensor([2.0, 0.5])
    rewards = torch.tensor([[1.0, NAN], [NAN, 3.0], [0.25, 1.0]])
    result = group_advantage(rewards, 3, weights=weights, impl=impl)
    close(result.advantages, advantages_by_hand([[2.0, 1.5, 1.0]]))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_group_of_masked_trajectories_has_no_mean_and_no_signal(impl):
    result = group_advantage(torch.tensor([NAN, NAN, 1.0, 0.0]), 2, impl=impl)
    assert result.mean.isnan().tolist() == [True, False]
    assert result.no_signal.tolist() == [True, False]
    assert result.advantages[:2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rewards_give_empty_results(impl):
    result = group_advantage(torch.empty(0, 2), 8, impl=impl)
    assert [len(part) for part in result] == [0, 0, 0, 0]


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_rewards_are_read_right(impl):
    table = torch.randn(2, 8)
    strided = group_advantage(table.T, 4, impl=impl).advantages
    assert torch.equal(strided, group_advantage(table.T.contiguous(), 4, impl=impl).advantages)


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
    close(result.advantages, advantages_by_hand(rewards.view(2, 4).tolist()), 1e-12)


def test_auto_is_native_where_it_is_built():
    expected = "native" if native.available() else "reference"
    assert group_advantage_impl(torch.zeros(2)) == expected
    assert group_advantage_impl(torch.zeros(2, dtype=torch.float64)) == "reference"


def test_no_gradient_flows_through_rewards():
    assert not group_advantage(torch.randn(4, requires_grad=True), 4, impl="reference").advantages.requires_grad


ROWS = torch.zeros(6)
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


@pytest.mark.parametrize("impl", IMPLS)
def test_a_weighted_sum_that_overflows_is_refused(impl):
    rewards = torch.full((2, 1), 3e38)
    with pytest.raises(ValueError, match="overflows"):
        group_advantage(rewards, 2, weights=torch.tensor([10.0]), impl=impl)
