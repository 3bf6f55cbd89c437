"""Reward components put together: one number for a person, one matrix for the advantage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from arft_fast.trajectory import Group

DEFAULT_WEIGHTS: Mapping[str, float] = {"format": 1.0, "accuracy": 1.0}
"""The paper's reward: accuracy + format, in [0, 2] (arXiv 2505.14246). Components that are not named here report."""


def reward_matrix(groups: Sequence[Group], names: Sequence[str]) -> np.ndarray:
    """Reward components of all trajectories, what ``kernels.group_advantage`` takes.

    Args:
        groups: the groups of a step, of any sizes.
        names: the K components, in the order of the columns.

    Returns:
        [B, K] float64, the trajectories of all groups one after another. NaN where a trajectory has no such component
        (it counts as 0), and all of the row where the world failed (it is left out of the group's baseline).
    """
    rows = [
        [float("nan") if trajectory.infra_failed else trajectory.rewards.get(name, float("nan")) for name in names]
        for group in groups
        for trajectory in group.trajectories
    ]
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(names))
