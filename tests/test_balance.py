from __future__ import annotations

import itertools
import pickle
import socket
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from arft_fast.policy.balance import balance, exchange
from arft_fast.policy.images import EncodedImage
from arft_fast.policy.parallel import Ranks
from arft_fast.trajectory import Ending, Group, Prompt, Trajectory

CPU = torch.device("cpu")


def _loads(costs: Sequence[Sequence[float]], plan: Sequence[Sequence[int]]) -> list[float]:
    loads = [0.0] * len(costs)
    for own, places in zip(costs, plan, strict=True):
        for cost, place in zip(own, places, strict=True):
            loads[place] += cost
    return loads


def _where_they_are(costs: Sequence[Sequence[float]]) -> list[list[int]]:
    return [[rank] * len(own) for rank, own in enumerate(costs)]


def _moves(plan: Sequence[Sequence[int]]) -> int:
    return sum(place != rank for rank, own in enumerate(plan) for place in own)


def _all_plans(costs: Sequence[Sequence[float]]) -> list[list[list[int]]]:
    plans = []
    for places in itertools.product(range(len(costs)), repeat=sum(map(len, costs))):
        remaining = iter(places)
        plans.append([[next(remaining) for _ in own] for own in costs])
    return plans


def _random_costs(seed: int, world: int, groups: int) -> list[list[float]]:
    rng = np.random.default_rng(seed)
    costs: list[list[float]] = [[] for _ in range(world)]
    for cost in rng.lognormal(0, 0.6, size=groups):
        costs[rng.integers(world)].append(float(cost))
    return costs


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("world", "groups"), [(2, 8), (3, 7), (4, 6)])
def test_the_slowest_rank_is_near_the_best_of_all_plans(seed: int, world: int, groups: int) -> None:
    costs = _random_costs(seed, world, groups)
    plan = balance(costs, least_gain=0.0)
    slowest = max(_loads(costs, plan))
    best = min(max(_loads(costs, other)) for other in _all_plans(costs))
    assert best <= slowest * (1 + 1e-12) and slowest <= 1.01 * (4 / 3 - 1 / (3 * world)) * best
    assert slowest <= max(_loads(costs, _where_they_are(costs)))


def test_few_groups_move() -> None:
    moved = fewest = 0
    for seed in range(20):
        costs = _random_costs(seed, 3, 7)
        plan = balance(costs, least_gain=0.0)
        slowest = max(_loads(costs, plan)) * (1 + 1e-12)
        moved += _moves(plan)
        fewest += min(_moves(other) for other in _all_plans(costs) if max(_loads(costs, other)) <= slowest)
    assert fewest <= moved <= 1.25 * fewest


def test_many_ranks_of_many_groups_come_out_even() -> None:
    rng = np.random.default_rng(0)
    costs = [rng.lognormal(0, 0.3, size=8).tolist() for _ in range(8)]
    plan = balance(costs)
    mean = sum(map(sum, costs)) / 8
    assert max(map(sum, costs)) > 1.1 * mean
    assert max(_loads(costs, plan)) < 1.02 * mean
    assert _moves(plan) < 16  # of 64; a partition that forgets where they were moves seven in eight


@pytest.mark.parametrize("costs", [[[3.0, 1.0], [4.0]], [[2.0] * 4] * 3, [[1.0], [1.0], []], [[], []], [[5.0, 1.0]]])
def test_nothing_moves_where_nothing_is_gained(costs: list[list[float]]) -> None:
    assert balance(costs) == _where_they_are(costs)


def test_a_gain_of_less_than_five_percent_moves_nothing() -> None:
    assert balance([[50.0, 4.0, 1.0], [50.0]]) == [[0, 0, 0], [1]]  # 55 would become 51 or 52, 5.4 % or more
    costs = [[50.0, 2.0, 2.0], [50.0]]  # 54 would become 52: 3.7 %
    assert balance(costs) == [[0, 0, 0], [1]]
    assert _loads(costs, balance(costs, least_gain=0.03)) == [52.0, 52.0]


def test_one_group_too_many_is_one_move() -> None:
    plan = balance([[1.0] * 6, [1.0] * 4, [1.0] * 5])
    assert _moves(plan) == 1 and plan[0].count(1) == 1


def test_work_in_one_place_is_spread_over_all() -> None:
    costs = [[1.0] * 12, [], [], []]
    assert _loads(costs, balance(costs)) == [3.0] * 4


def test_where_moves_and_swaps_get_stuck_the_best_partition_is_taken() -> None:
    costs = [[9.0, 9.0, 5.0, 5.0, 3.0, 8.0], []]
    assert sorted(_loads(costs, balance(costs))) == [19.0, 20.0]


def test_no_plan_beats_the_largest_group() -> None:
    costs = [[10.0, 1.0, 1.0], [2.0]]
    plan = balance(costs)
    assert max(_loads(costs, plan)) == 10.0 and _moves(plan) == 2


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ([], "costs: is empty; give a list for each rank"),
        ([[1.0, -1.0]], "costs: must be finite and not negative"),
        ([[float("nan")]], "costs: must be finite and not negative"),
    ],
)
def test_bad_costs_are_named(costs: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        balance(costs)


def test_a_plan_for_other_groups_is_refused() -> None:
    alone = Ranks(rank=0, world=1, device=CPU)
    with pytest.raises(ValueError, match=r"plan: is for ranks with \[1\] groups, but rank 0 of 1 has 2"):
        exchange(["a", "b"], [[0]], alone)
    with pytest.raises(ValueError, match="plan: is for ranks with"):
        exchange(["a"], [[1]], alone)


def test_one_rank_keeps_what_it_has() -> None:
    groups = [object(), object()]
    kept = exchange(groups, balance([[1.0, 2.0]]), Ranks(rank=0, world=1, device=CPU))
    assert all(a is b for a, b in zip(kept, groups, strict=True))


def _picture(seed: int) -> EncodedImage:
    pixels = torch.randn(16 * 16, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(seed))
    return EncodedImage(pixel_values=pixels, grid_thw=(1, 16, 16), tokens=64, key=str(seed))


def _group(name: str) -> Group:
    """Eight samples around one picture; a tool made another one for each."""
    prompt, picture = Prompt(uid=name, task="t", messages=[]), _picture(1)
    small = EncodedImage(pixel_values=torch.zeros(4, 8), grid_thw=(1, 2, 2), tokens=1, key="small")
    trajectories = [
        Trajectory(
            prompt=prompt, sample=sample, token_ids=np.arange(sample + 9), policy_mask=np.arange(sample + 9) > 4,
            logprobs=np.zeros(sample + 9, dtype=np.float32), images=[picture, small], turns=[], ending=Ending.ANSWER,
        )
        for sample in range(8)
    ]  # fmt: skip
    return Group(prompt=prompt, trajectories=trajectories)


def test_a_picture_that_eight_samples_share_is_sent_once() -> None:
    one = _group("a")
    picture_bytes = one.trajectories[0].images[0].pixel_values.nbytes
    size = len(pickle.dumps([one, "and its advantages"], protocol=5))
    assert picture_bytes < size < 1.2 * picture_bytes
    separate = sum(len(pickle.dumps(trajectory, protocol=5)) for trajectory in one.trajectories)
    assert separate > 7 * picture_bytes


CASES = {
    2: [[[3.0, 2.0, 2.0, 1.0], [1.0]], [[1.0], [1.0]], [[5.0, 5.0], [3.0, 3.0]]],  # one way, nothing, both ways
    3: [
        [[1.0, 1.0], [6.0, 5.0, 5.0], [2.0]],
        [[9.0, 1.0, 1.0], [1.0, 8.0, 8.0], []],  # one rank starts with nothing
        [[9.0, 1.0], [1.0, 5.0, 5.0], [7.0, 7.0]],
    ],
}


def _rank(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    ranks = Ranks(rank=rank, world=world, device=CPU)
    results = []
    for costs in CASES[world]:
        mine = [_group(f"{rank}.{number}") for number in range(len(costs[rank]))]
        plan = balance(ranks.gather([costs[rank]]))
        got = exchange(mine, plan, ranks)
        results.append((plan, [one.prompt.uid for one in got]))
        assert all(one in got for one, place in zip(mine, plan[rank], strict=True) if place == rank)  # not copied
        for one in got:
            for trajectory, sent in zip(one.trajectories, _group(one.prompt.uid).trajectories, strict=True):
                assert trajectory.prompt is one.prompt and np.array_equal(trajectory.token_ids, sent.token_ids)
                assert trajectory.images[0] is one.trajectories[0].images[0]  # shared again
                for image, original in zip(trajectory.images, sent.images, strict=True):
                    assert torch.equal(image.pixel_values, original.pixel_values) and image.key == original.key
    torch.save(results, Path(folder) / f"{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_groups_arrive_where_the_plan_says_and_none_is_lost(world: int, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, args=(world, port, str(tmp_path)), nprocs=world)
    by_rank = [torch.load(tmp_path / f"{rank}", weights_only=False) for rank in range(world)]
    assert any(_moves(balance(costs)) > 1 for costs in CASES[world])
    for number, costs in enumerate(CASES[world]):
        plan = balance(costs)
        everybody = []
        for rank in range(world):
            made, names = by_rank[rank][number]
            stayed = [f"{rank}.{k}" for k, place in enumerate(plan[rank]) if place == rank]
            came = [
                f"{origin}.{k}"
                for origin, own in enumerate(plan)
                for k, place in enumerate(own)
                if place == rank != origin
            ]
            assert made == plan and names == [*stayed, *came]
            everybody += names
        assert sorted(everybody) == sorted(f"{rank}.{k}" for rank, own in enumerate(costs) for k in range(len(own)))
