"""Which rank trains which group, and the way there: all ranks wait for the slowest one in every step.

Gradients are sums over ranks with global denominators, so that where a group is trained changes the time and no result.

Dimension letter: W ranks.
"""

from __future__ import annotations

import heapq
import pickle
from collections.abc import Sequence
from itertools import product
from typing import TypeVar

import torch
import torch.distributed as dist

from arft_fast.policy.parallel import Ranks

T = TypeVar("T")
Plan = list[list[int]]
"""``plan[r][g]``: the rank that trains group g of rank r."""

_CLOSE = 1.01
"""The slowest rank may take 1 % longer than by the best partition that was found, if fewer groups move then."""


def balance(costs: Sequence[Sequence[float]], least_gain: float = 0.05) -> Plan:
    """Even out the ranks' work by moving few groups.

    How even it can be is found by Karmarkar-Karp largest differencing of all groups (Karmarkar & Karp 1982), whose
    slowest rank takes at most 4/3 - 1/(3 W) of the shortest time possible (Michiels, Korst & Aarts 2003). Single moves
    and swaps away from the slowest rank then start from where the groups are, until that is reached within 1 %; where
    they get stuck the partition itself is the plan, its parts on the ranks that hold most of them.

    The same costs give the same plan on every rank.

    Args:
        costs: of each rank's groups, >= 0 in any unit: ``ranks.gather([mine])``.
        least_gain: share of the slowest rank's time that must be gained for anything to move.

    Raises:
        ValueError: no ranks, or a cost that is negative or not finite.
    """
    if not costs:
        raise ValueError("costs: is empty; give a list for each rank")
    if not all(0 <= cost < float("inf") for own in costs for cost in own):
        raise ValueError("costs: must be finite and not negative")
    flat = [float(cost) for own in costs for cost in own]
    home = [rank for rank, own in enumerate(costs) for _ in own]
    parts = _largest_differencing(flat, len(costs))
    wanted = _CLOSE * max(sum(flat[i] for i in part) for part in parts)
    places = _repair(flat, home, len(costs), wanted) or _settle(parts, home, len(costs))
    if max(_loads(flat, places, len(costs))) >= (1 - least_gain) * max(_loads(flat, home, len(costs))):
        places = home
    remaining = iter(places)
    return [[next(remaining) for _ in own] for own in costs]


def exchange(groups: Sequence[T], plan: Sequence[Sequence[int]], ranks: Ranks) -> list[T]:
    """Send groups to where they are trained; all ranks call this with the same plan.

    Only what moves travels, straight to its rank, pickled once: what several groups for one rank share (an image, a
    prompt) is sent once and shared again there. Nothing is sent where nothing moves.

    Args:
        groups: this rank's, of any type that can be pickled.

    Returns:
        What this rank trains: its own that stay, then what came, by rank and order of its origin.

    Raises:
        ValueError: the plan is for other groups or other ranks.
    """
    mine = plan[ranks.rank] if len(plan) == ranks.world else ()
    if len(mine) != len(groups) or not all(0 <= place < ranks.world for own in plan for place in own):
        raise ValueError(
            f"plan: is for ranks with {[len(own) for own in plan]} groups, but rank {ranks.rank} of {ranks.world} "
            f"has {len(groups)}; make it by balance from the gathered costs of these groups"
        )
    stay = [group for group, place in zip(groups, mine, strict=True) if place == ranks.rank]
    if all(place == rank for rank, own in enumerate(plan) for place in own):
        return stay
    parcels = {
        place: pickle.dumps([group for group, to in zip(groups, mine, strict=True) if to == place], protocol=5)
        for place in sorted(set(mine) - {ranks.rank})
    }
    sizes = ranks.gather([{place: len(parcel) for place, parcel in parcels.items()}])
    arriving = [
        (rank, torch.empty(own[ranks.rank], dtype=torch.uint8)) for rank, own in enumerate(sizes) if ranks.rank in own
    ]
    leaving = [(place, torch.frombuffer(bytearray(parcel), dtype=torch.uint8)) for place, parcel in parcels.items()]
    # All at once, or two ranks that send to each other would wait for each other.
    pending = [dist.irecv(buffer, rank) for rank, buffer in arriving]
    pending += [dist.isend(buffer, place) for place, buffer in leaving]
    for work in pending:
        assert work is not None, "this rank takes part in the process group"
        work.wait()
    return [*stay, *(group for _, buffer in arriving for group in pickle.loads(buffer.numpy().tobytes()))]


def _loads(costs: Sequence[float], places: Sequence[int], world: int) -> list[float]:
    loads = [0.0] * world
    for cost, place in zip(costs, places, strict=True):
        loads[place] += cost
    return loads


def _largest_differencing(costs: Sequence[float], world: int) -> list[list[int]]:
    """Indices of ``costs`` in ``world`` parts of nearly the same sum.

    Each cost starts as a partition of its own, the other parts empty. The two partitions that are most uneven are
    merged, the largest part of one with the smallest of the other, until one is left.
    """
    if not costs:
        return [[] for _ in range(world)]
    # (unevenness negated, tie-breaker, parts as (sum, indices) by falling sum)
    heap: list[tuple[float, int, list[tuple[float, list[int]]]]] = [
        (-cost if world > 1 else 0.0, i, [(cost, [i]), *((0.0, []) for _ in range(world - 1))])
        for i, cost in enumerate(costs)
    ]
    heapq.heapify(heap)
    while len(heap) > 1:
        (_, tie, first), (_, other, second) = heapq.heappop(heap), heapq.heappop(heap)
        merged = [(a + b, [*x, *y]) for (a, x), (b, y) in zip(first, reversed(second), strict=True)]
        merged.sort(key=lambda part: (-part[0], part[1]))
        heapq.heappush(heap, (merged[-1][0] - merged[0][0], min(tie, other), merged))
    return [sorted(part) for _, part in heap[0][2]]


def _repair(costs: Sequence[float], home: Sequence[int], world: int, wanted: float) -> list[int] | None:
    """Moves and swaps that take from the slowest rank, the best first, until none takes longer than ``wanted``.

    None where no single one helps. Each lowers the larger load of two ranks, so that it comes to an end.
    """
    places, loads = list(home), _loads(costs, home, world)
    while max(loads) > wanted:
        slowest = max(range(world), key=loads.__getitem__)
        # (larger load of the two ranks, groups that travel, group, its new rank, group that comes in return); what is
        # gained must be more than rounding, or two moves could undo each other for ever.
        best = (loads[slowest] * (1 - 1e-9), 0, -1, -1, -1)
        for i in (i for i, place in enumerate(places) if place == slowest):
            for rank in (rank for rank in range(world) if rank != slowest):
                after = max(loads[slowest] - costs[i], loads[rank] + costs[i])
                best = min(best, (after, 1, i, rank, -1))
            for j in (j for j, place in enumerate(places) if place != slowest and costs[j] < costs[i]):
                less = costs[i] - costs[j]
                best = min(best, (max(loads[slowest] - less, loads[places[j]] + less), 2, i, places[j], j))
        if best[2] < 0:
            return None
        _, _, i, rank, j = best
        places[i] = rank
        if j >= 0:
            places[j] = slowest
        loads = _loads(costs, places, world)
    return places


def _settle(parts: Sequence[Sequence[int]], home: Sequence[int], world: int) -> list[int]:
    """The parts on ranks, those first of which most is there already."""
    there = [[sum(home[i] == rank for i in part) for rank in range(world)] for part in parts]
    rank_of: dict[int, int] = {}
    for number, rank in sorted(product(range(world), repeat=2), key=lambda pair: -there[pair[0]][pair[1]]):
        if number not in rank_of and rank not in rank_of.values():
            rank_of[number] = rank
    part_of = {i: number for number, part in enumerate(parts) for i in part}
    return [rank_of[part_of[i]] for i in range(len(home))]
