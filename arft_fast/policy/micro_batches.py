"""A rank's trajectories as forward passes: trees within a token budget, or padded batches where a tree is not exact."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace

from arft_fast.observe.theory import ModelShape, train_flops
from arft_fast.policy.balance import balance, exchange
from arft_fast.policy.batch import Batch, collate, collate_tree, tree_paths
from arft_fast.policy.model import Policy
from arft_fast.policy.packing import pack, tree_work
from arft_fast.policy.parallel import Ranks
from arft_fast.policy.tree_guard import TreeCheck, check_tree, obstacle
from arft_fast.trajectory import Trajectory


def micro_batches(
    policy: Policy, trajectories: Sequence[Trajectory], budget: int, prefix_tree: bool = True
) -> Iterator[tuple[list[int], Batch]]:
    """Indices of ``trajectories`` with the batch that holds them, each trajectory once.

    Args:
        budget: tokens in one forward pass, at least one trajectory: tokens of the tree, or of the padded batch.
        prefix_tree: share what trajectories have in common; where the model does not allow it (``obstacle``) this is
            warned of once, and batches are padded.
    """
    if not trajectories:
        return
    if prefix_tree and (why := obstacle(policy.model, max(len(t.token_ids) for t in trajectories))):
        warnings.warn(f"no prefix tree, every trajectory is computed by itself: {why}", stacklevel=2)
        prefix_tree = False
    if not prefix_tree:
        for chosen in padded(trajectories, budget):
            yield chosen, collate(policy, [trajectories[i] for i in chosen])
        return
    paths = tree_paths(policy, trajectories)
    for chosen in pack(paths, groups(trajectories), budget):
        yield chosen, collate_tree(policy, [trajectories[i] for i in chosen], [paths[i] for i in chosen])


def check_first_batch(
    policy: Policy, trajectories: Sequence[Trajectory], budget: int, *, temperature: float
) -> TreeCheck | None:
    """Try the prefix tree on the first micro-batch; None where batches are padded.

    Raises:
        TreeMismatch: see ``check_tree``.
    """
    trains = [t for t in trajectories if not t.infra_failed and t.completion_length]
    for chosen, batch in micro_batches(policy, trains, budget):
        if batch.tree is None:
            return None
        return check_tree(policy, [trains[i] for i in chosen], temperature=temperature)
    return None


def groups(trajectories: Sequence[Trajectory]) -> list[list[int]]:
    """Indices of the trajectories of each prompt, in order."""
    by_prompt: dict[str, list[int]] = {}
    for i, trajectory in enumerate(trajectories):
        by_prompt.setdefault(trajectory.prompt.uid, []).append(i)
    return list(by_prompt.values())


def padded(trajectories: Sequence[Trajectory], budget: int) -> Iterator[list[int]]:
    """Indices in batches of up to ``budget`` padded tokens (at least one trajectory), by rising length."""
    batch: list[int] = []
    for i in sorted(range(len(trajectories)), key=lambda i: (len(trajectories[i].token_ids), i)):
        if batch and (len(batch) + 1) * len(trajectories[i].token_ids) > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def share_evenly(
    policy: Policy, episodes: Sequence[tuple[Trajectory, float]], ranks: Ranks, prefix_tree: bool = True
) -> list[tuple[Trajectory, float]]:
    """This rank's part of all ranks' (trajectory, advantage), whole groups moved so that ranks take equally long.

    The cost of a group is the floating-point operations of its update (``observe.theory``). What travels leaves its
    pictures and texts behind; the encoded images come along.
    """
    if ranks.world == 1:
        return list(episodes)
    members = groups([trajectory for trajectory, _ in episodes])
    units = [[episodes[i] for i in group] for group in members]
    costs = [_cost(policy, [trajectory for trajectory, _ in unit], prefix_tree) for unit in units]
    plan = balance(ranks.gather([costs]))
    return [episode for unit in exchange([_light(unit) for unit in units], plan, ranks) for episode in unit]


def _cost(policy: Policy, group: Sequence[Trajectory], prefix_tree: bool) -> float:
    """Operations of one group's forward and backward passes; tokens for models of an unknown shape."""
    paths = tree_paths(policy, group)
    try:
        shape = ModelShape.of(policy.model.config)
    except ValueError:  # a mixture of experts, say: no formula, but tokens are a fair measure
        return float(sum(len(t.token_ids) for t in group))
    images = [{image.key: image.grid_thw for image in t.images} for t in group]
    if prefix_tree:
        return train_flops(shape, tree_work(paths, shape, {key: grid for some in images for key, grid in some.items()}))
    return sum(train_flops(shape, tree_work([p], shape, grids)) for p, grids in zip(paths, images, strict=True))


def _light(unit: Sequence[tuple[Trajectory, float]]) -> list[tuple[Trajectory, float]]:
    """What the loss needs of a group."""
    prompt = replace(unit[0][0].prompt, images=(), messages=())
    return [(replace(trajectory, prompt=prompt, turns=()), advantage) for trajectory, advantage in unit]
