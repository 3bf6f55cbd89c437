"""Group-relative advantages in all modes: every implementation against the definition in a Python loop."""

import itertools

import pytest
import torch

from arft_fast.kernels import group_advantage, triton_support

from .group_advantage_by_hand import (
    CENTERS,
    DEVICE_OF_TRITON,
    IMPLS,
    NAN,
    ORDERS,
    SCALES,
    advantages_by_hand,
    close,
    offsets_of,
    run,
)


def random_rewards(rows, components, *, dtype=torch.float64):
    """Rewards with some components that do not apply and the last row of the first half left out."""
    generator = torch.Generator().manual_seed(rows)
    rewards = torch.randn(rows, components, generator=generator, dtype=dtype)
    rewards[torch.rand(rows, components, generator=generator) < 0.15] = NAN
    rewards[rows // 2] = NAN
    return rewards


def check(impl, rewards, sizes, tolerance, *, weights=None, **options):
    tensor = None if weights is None else torch.tensor(weights, dtype=rewards.dtype)
    result = run(rewards, offsets_of(sizes), weights=tensor, impl=impl, **options)
    close(result.advantages, advantages_by_hand(rewards.tolist(), sizes, weights=weights, **options), tolerance)
    return result


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("center", CENTERS)
def test_every_mode_equals_the_definition(impl, center, scale, order):
    sizes = [1, 2, 7, 0, 5]
    # The native library takes float32 only; the other two show their float64.
    dtype, tolerance = (torch.float32, 2e-5) if impl == "native" else (torch.float64, 1e-10)
    rewards = random_rewards(sum(sizes), 3, dtype=dtype)
    options = {"weights": [1.0, 0.0, -0.5], "gates": {2: (0, -0.25)}, "std_floor": 0.9}
    for whiten in (False, True):
        check(impl, rewards, sizes, tolerance, center=center, scale=scale, order=order, whiten=whiten, **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("order", ORDERS)
def test_groups_larger_than_a_block_are_read_whole(impl, order):
    sizes = [1000, 3, 129]
    check(impl, random_rewards(sum(sizes), 2, dtype=torch.float32), sizes, 2e-5, order=order, scale="batch")


@pytest.mark.parametrize("impl", IMPLS)
def test_more_groups_than_a_block_holds_share_one_batch(impl):
    sizes = [1] * 130
    rewards = random_rewards(130, 1, dtype=torch.float32)
    check(impl, rewards, sizes, 2e-5, center="none", scale="batch")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("components", [1, 5, 17])
def test_any_number_of_components_is_read(impl, components):
    rewards = random_rewards(10, components, dtype=torch.float32)
    weights = [1.0 - 0.1 * k for k in range(components)]
    check(impl, rewards, [4, 6], 2e-5, order="normalize_then_sum", weights=weights, gates={0: (components - 1, 0.5)})


@pytest.mark.parametrize("impl", IMPLS)
def test_mean_and_std_are_those_of_the_gated_weighted_sum_in_every_mode(impl):
    rewards = torch.tensor([[1.0, 4.0], [0.0, 4.0], [1.0, 2.0], [1.0, NAN]])
    combined = torch.tensor([3.0, 0.0, 2.0, 1.0])
    for order, scale, center in itertools.product(ORDERS, ["none", "batch"], ["mean", "none"]):
        options = {"weights": torch.tensor([1.0, 0.5]), "gates": {1: (0, 0.5)}}
        result = run(rewards, 4, order=order, scale=scale, center=center, std_floor=9.0, impl=impl, **options)
        close(result.mean, [combined.mean()])
        close(result.std, [combined.std()])


@pytest.mark.parametrize("impl", IMPLS)
def test_without_centre_and_scale_the_combined_reward_comes_back(impl):
    rewards = torch.tensor([[1.0, 0.5], [0.25, NAN], [NAN, NAN], [3.0, -1.0]])
    result = run(rewards, 2, weights=torch.tensor([2.0, 4.0]), center="none", scale="none", impl=impl)
    assert result.advantages.tolist() == [4.0, 0.5, 0.0, 2.0]


@pytest.mark.parametrize("impl", IMPLS)
def test_leave_one_out_gives_a_lone_row_nothing(impl):
    result = run(torch.tensor([5.0, NAN, 1.0, 3.0]), 2, center="leave_one_out", scale="none", impl=impl)
    assert result.advantages.tolist() == [0.0, 0.0, -2.0, 2.0] and result.no_signal.tolist() == [True, False]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("center", ["mean", "leave_one_out"])
def test_a_constant_group_stays_exactly_zero_when_whitened(impl, center, order):
    rewards = torch.rand(40, 1, generator=torch.Generator().manual_seed(0))
    rewards[:10] = 0.1
    result = run(rewards, 10, center=center, order=order, whiten=True, impl=impl)
    assert (result.advantages[:10] == 0).all() and result.no_signal.tolist() == [True, False, False, False]


def test_subtracting_the_mean_of_centred_advantages_would_make_noise_of_exact_zeros():
    rewards = torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards[:10] = 0.1
    advantages = group_advantage(rewards, 10).advantages
    assert (advantages[:10] == 0).all() and (advantages - advantages.mean())[:10].abs().min() > 0


@pytest.mark.parametrize("impl", IMPLS)
def test_whitened_advantages_have_std_one(impl):
    rewards = random_rewards(12, 2, dtype=torch.float32)
    for center in CENTERS:
        result = run(rewards, 4, center=center, whiten=True, epsilon=1e-9, impl=impl)
        valid = result.advantages[~rewards.isnan().all(1)]
        close(valid.std(), 1.0)
        close(valid.mean(), 0.0)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_std_floor_bounds_what_a_small_difference_becomes(impl):
    rewards = torch.tensor([1.0, 1.0 + 2**-10])
    floored = run(rewards, 2, std_floor=0.5, epsilon=1e-4, impl=impl)
    close(floored.advantages, torch.tensor([-1.0, 1.0]) * 2**-11 / (0.5 + 1e-4), 1e-9)
    assert run(rewards, 2, epsilon=1e-4, impl=impl).advantages[1] > 500 * floored.advantages[1]


@pytest.mark.parametrize("impl", IMPLS)
def test_normalize_then_sum_tells_apart_rows_whose_sums_tie(impl):
    rewards, weights = torch.tensor([[0.0, 2.0], [1.0, 0.0]]), torch.tensor([1.0, 0.5])
    assert run(rewards, 2, weights=weights, impl=impl).no_signal.item()
    decomposed = run(rewards, 2, weights=weights, order="normalize_then_sum", whiten=False, impl=impl)
    close(decomposed.advantages, [-0.5 / 2**0.5, 0.5 / 2**0.5], 1e-3)


@pytest.mark.parametrize("impl", IMPLS)
def test_normalize_then_sum_whitens_unless_told_not_to(impl):
    rewards = random_rewards(12, 2, dtype=torch.float32)

    def advantages(order, whiten):
        return run(rewards, 4, order=order, whiten=whiten, impl=impl).advantages

    for order, default in (("normalize_then_sum", True), ("sum_then_normalize", False)):
        assert torch.equal(advantages(order, None), advantages(order, default))
        assert not torch.allclose(advantages(order, None), advantages(order, not default))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_gate_opens_at_its_threshold(impl):
    rewards = torch.tensor([[0.7, 5.0], [0.699, 5.0], [NAN, 5.0]])  # float32(0.7) < 0.7
    result = run(rewards, 3, gates={1: (0, 0.7)}, center="none", scale="none", impl=impl)
    close(result.advantages, [5.7, 0.699, 5.0], 1e-6)


@pytest.mark.parametrize("impl", ["reference", IMPLS[2]])
def test_a_threshold_of_float64_rewards_is_not_rounded(impl):
    # float32(0.1) > 0.1 and float32(0.7) < 0.7 - 1e-9
    rewards = torch.tensor([[0.1, 5.0], [0.7 - 1e-9, 5.0]], dtype=torch.float64)
    for threshold, expected in ((0.1, [5.1, 5.7 - 1e-9]), (0.7, [0.1, 0.7 - 1e-9])):
        result = run(rewards, 2, gates={1: (0, threshold)}, center="none", scale="none", impl=impl)
        close(result.advantages, expected, 1e-12)


def test_thresholds_are_compared_in_the_dtype_of_the_rewards():
    rewards = torch.tensor([[0.7, 5.0]], dtype=torch.bfloat16)  # 0.69921875
    open_gate = group_advantage(rewards, 1, gates={1: (0, 0.7)}, center="none", scale="none")
    shut_gate = group_advantage(rewards.double(), 1, gates={1: (0, 0.7)}, center="none", scale="none")
    assert open_gate.advantages.item() > 5 > shut_gate.advantages.item()


@pytest.mark.parametrize("impl", IMPLS)
def test_gates_look_at_the_ungated_rewards(impl):
    rewards = torch.tensor([[0.0, 1.0, 8.0]])
    result = run(rewards, 1, gates={1: (0, 0.5), 2: (1, 0.5)}, center="none", scale="none", impl=impl)
    assert result.advantages.item() == 8.0


@pytest.mark.parametrize("impl", IMPLS)
def test_a_gated_component_still_applies(impl):
    gated = torch.tensor([[0.0, 9.0], [1.0, 1.0], [1.0, 3.0]])
    options = {"order": "normalize_then_sum", "impl": impl}
    result = run(gated, 3, gates={1: (0, 0.5)}, **options).advantages
    zero, missing = gated.clone(), gated.clone()
    zero[0, 1], missing[0, 1] = 0.0, NAN
    assert torch.equal(result, run(zero, 3, **options).advantages)
    assert not torch.allclose(result, run(missing, 3, **options).advantages)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_gate_does_not_revive_a_row_that_is_left_out(impl):
    rewards = torch.tensor([[NAN, NAN], [0.0, 1.0], [1.0, 1.0]])
    for order in ORDERS:
        result = run(rewards, 3, gates={0: (0, 0.5), 1: (0, 0.5)}, order=order, center="none", scale="none", impl=impl)
        assert result.advantages[0].item() == 0.0
        close(result.mean, [1.0])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_group_does_not_feel_the_others_unless_the_batch_is_asked(impl):
    one, two = random_rewards(5, 2, dtype=torch.float32), random_rewards(9, 2, dtype=torch.float32)
    both, offsets = torch.cat([one, two]), offsets_of([5, 9])
    for scale in ("group", "none"):
        alone = run(one, 5, center="leave_one_out", scale=scale, impl=impl).advantages
        assert torch.equal(run(both, offsets, center="leave_one_out", scale=scale, impl=impl).advantages[:5], alone)
    assert not torch.equal(
        run(both, offsets, scale="batch", impl=impl).advantages[:5], run(one, 5, scale="batch", impl=impl).advantages
    )


@pytest.mark.skipif(not triton_support.available(DEVICE_OF_TRITON), reason="no device for triton")
@pytest.mark.parametrize(
    ("scale", "whiten", "launches"),
    [("group", False, 1), ("none", False, 1), ("batch", False, 2), ("group", True, 3), ("batch", True, 4)],
)
def test_triton_launches_as_often_as_it_says(monkeypatch, scale, whiten, launches):
    from arft_fast.kernels import triton_group_advantage

    seen = []
    for name in ("moments_kernel", "advantage_kernel", "whiten_kernel"):
        kernel = getattr(triton_group_advantage, name)

        class Counted:
            def __getitem__(self, grid, name=name, kernel=kernel):
                seen.append(name)
                return kernel[grid]

        monkeypatch.setattr(triton_group_advantage, name, Counted())
    run(torch.rand(4, 2), 2, scale=scale, whiten=whiten, impl="triton")
    assert len(seen) == launches
