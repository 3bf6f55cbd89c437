"""Group-relative advantages: TRL's formulae, and what must not change them, for any rewards."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arft_fast.kernels import group_advantage, native

from .group_advantage_by_hand import CENTERS, NAN, ORDERS, SCALES, close, offsets_of

# TRL 1.16's formulae, written from their definition: NaN-aware moments of [P, G] or [P, G, K], std with ddof 1.


def nanstd(x, dim, keepdim=True):
    count = (~x.isnan()).sum(dim, keepdim=True)
    squares = (x - x.nanmean(dim, keepdim=True)).square().nansum(dim, keepdim=True)
    return (squares / (count - 1)).sqrt()


def scored_in_groups_of_eight():
    rewards = torch.randn(4, 8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rewards[0, 3], rewards[2, 5, 1] = NAN, NAN
    rewards[3] = 0.1  # a group without signal
    return rewards, torch.tensor([1.0, 0.3, -0.5], dtype=torch.float64)


@pytest.mark.parametrize("scale", SCALES)
def test_sum_then_normalize_is_trl_s(scale):
    rewards, weights = scored_in_groups_of_eight()
    combined = (rewards * weights).nansum(2).masked_fill(rewards.isnan().all(2), NAN)
    std = {"group": nanstd(combined, 1), "batch": nanstd(combined, (0, 1)), "none": 1 - 1e-4}[scale]
    expected = ((combined - combined.nanmean(1, keepdim=True)) / (std + 1e-4)).nan_to_num(0.0)
    ours = group_advantage(rewards.view(-1, 3), 8, weights=weights, scale=scale).advantages
    close(ours, expected.flatten(), 1e-9)


def test_normalize_then_sum_is_trl_s_though_it_subtracts_no_batch_mean():
    rewards, weights = scored_in_groups_of_eight()
    each = (rewards - rewards.nanmean(1, keepdim=True)) / (nanstd(rewards, 1) + 1e-4)
    combined = (each * weights).nansum(2).masked_fill(rewards.isnan().all(2), NAN)
    whitened = (combined - combined.nanmean()) / (nanstd(combined, (0, 1)) + 1e-4)
    ours = group_advantage(rewards.view(-1, 3), 8, weights=weights, order="normalize_then_sum")
    close(ours.advantages, whitened.nan_to_num(0.0).flatten(), 1e-9)
    assert ours.no_signal.tolist() == [False, False, False, True]
    assert (whitened[3] != 0).any()  # TRL's own zeros are rounding errors here


@st.composite
def group_tables(draw):
    """Rewards [B, K] in float64 in groups of at least two rows, and their sizes."""
    sizes = draw(st.lists(st.integers(2, 6), min_size=1, max_size=4))
    components = draw(st.integers(1, 3))
    count = sum(sizes) * components
    cells = draw(st.lists(st.integers(-50, 50).map(lambda v: v / 10) | st.just(NAN), min_size=count, max_size=count))
    return torch.tensor(cells, dtype=torch.float64).view(-1, components), sizes


modes = st.fixed_dictionaries(
    {"scale": st.sampled_from(SCALES), "order": st.sampled_from(ORDERS), "whiten": st.none() | st.booleans()}
)
centred = st.sampled_from(["mean", "leave_one_out"])


@settings(max_examples=60, deadline=None)
@given(group_tables(), modes, centred, st.integers(-100, 100))
def test_a_shift_of_a_component_that_always_applies_changes_nothing(table, mode, center, shift):
    rewards, sizes = table
    rewards = rewards.nan_to_num(0.0)
    moved = rewards + torch.tensor([shift] + [0] * (rewards.shape[1] - 1))
    before, after = (group_advantage(r, offsets_of(sizes), center=center, **mode).advantages for r in (rewards, moved))
    torch.testing.assert_close(before, after, rtol=1e-6, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(group_tables(), modes, st.sampled_from(CENTERS), st.sampled_from([0.25, 8.0]))
def test_scaling_rewards_and_epsilon_together_changes_nothing_that_is_scaled(table, mode, center, factor):
    rewards, sizes = table
    mode = mode | {"whiten": False}
    before = group_advantage(rewards, offsets_of(sizes), center=center, **mode).advantages
    epsilon = {"epsilon": factor * 1e-4}
    after = group_advantage(factor * rewards, offsets_of(sizes), center=center, **epsilon, **mode).advantages
    torch.testing.assert_close(after, before * (factor if mode["scale"] == "none" else 1.0), rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(group_tables(), modes, st.sampled_from(CENTERS), st.randoms(use_true_random=False))
def test_the_order_within_a_group_does_not_matter(table, mode, center, random):
    rewards, sizes = table
    order = []
    for size in sizes:
        rows = list(range(len(order), len(order) + size))
        random.shuffle(rows)
        order += rows
    before = group_advantage(rewards, offsets_of(sizes), center=center, **mode).advantages
    after = group_advantage(rewards[order], offsets_of(sizes), center=center, **mode).advantages
    torch.testing.assert_close(after, before[order], rtol=1e-6, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(group_tables(), modes, centred)
def test_centred_advantages_of_a_group_add_up_to_zero(table, mode, center):
    rewards, sizes = table
    result = group_advantage(rewards, offsets_of(sizes), center=center, **mode)
    for part in result.advantages.split(sizes):
        assert abs(part.sum().item()) < 1e-9 * (1 + part.abs().sum().item())


@pytest.mark.skipif(not native.available(), reason="not built")
@settings(max_examples=150, deadline=None)
@given(group_tables(), modes, st.sampled_from(CENTERS), st.data())
def test_the_native_library_equals_the_reference_in_every_mode(table, mode, center, data):
    rewards, sizes = table
    component = st.integers(0, rewards.shape[1] - 1)
    gates = data.draw(st.none() | st.dictionaries(component, st.tuples(component, st.floats(-2, 2))))
    # A large epsilon: where components cancel, it is what rounding errors are divided by.
    options = mode | {"center": center, "gates": gates, "epsilon": 0.1, "std_floor": data.draw(st.floats(0, 1))}
    fast, slow = (
        group_advantage(rewards.float(), offsets_of(sizes), impl=impl, **options) for impl in ("native", "reference")
    )
    for name in ("advantages", "mean", "std"):
        torch.testing.assert_close(getattr(fast, name), getattr(slow, name), rtol=1e-6, atol=1e-7, equal_nan=True)
    for result in (fast, slow):
        silent = [not bool(part.any()) for part in result.advantages.split(sizes)]
        assert result.no_signal.tolist() == silent
