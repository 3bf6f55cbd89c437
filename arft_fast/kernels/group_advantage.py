"""Group-relative advantages. Dimension letters: B trajectories, P groups, G samples of a group, K reward components."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import checks, native, reference
from .reference import Scale

Impl = Literal["auto", "native", "reference"]


class GroupAdvantage(NamedTuple):
    """What ``group_advantage`` returns."""

    advantages: Tensor
    """[B]; 0 for trajectories that are left out."""
    mean: Tensor
    """[P] mean reward of each group's valid rows; NaN without one (nothing was scored, so it is not 0)."""
    std: Tensor
    """[P] std (ddof 1) of each group's valid rows, whatever ``scale`` is; 0 with fewer than two."""
    no_signal: Tensor
    """[P] bool; True where every advantage of the group is exactly 0, so that its policy gradient is too."""


def group_advantage(
    rewards: Tensor,
    groups: int | Tensor,
    *,
    weights: Tensor | None = None,
    scale: Scale = "group",
    epsilon: float = 1e-4,
    impl: Impl = "auto",
) -> GroupAdvantage:
    """``A_i = (r_i - mean(r_group)) / (std(r_group) + epsilon)`` with ``r_i = sum_k weights[k] * rewards[i, k]``.

    GRPO's outcome supervision (arXiv 2402.03300, section 4.1.2). The std has ddof 1. A NaN component is "not
    applicable" and counts 0; a row of only NaN (a masked trajectory) is left out of mean and std and gets 0. A group
    whose rewards are all equal gets exactly 0, however its mean rounds.

    Args:
        rewards: [B] or [B, K] floating, NaN as above.
        groups: the size G of every group (consecutive rows), or offsets [P + 1] of groups of any size: group p holds
            the rows ``groups[p] .. groups[p + 1] - 1``.
        weights: [K] floating; None: ones.
        scale: divide by the std of the group (``"group"``), of all valid rows (``"batch"``), or not at all
            (``"none"``: Dr. GRPO, arXiv 2503.20783).
        epsilon: added to the std before the division.
        impl: ``"native"``: the C++ library, float32 on a CPU; ``"reference"``: PyTorch anywhere; ``"auto"``: the
            native one where it applies and is built (``group_advantage_impl`` says which).

    Returns:
        float64 tensors for float64 rewards, else float32. No gradient flows through them.

    Raises:
        TypeError: a dtype or type is wrong.
        ValueError: a shape, device or value is wrong. Values are read on a CPU only; elsewhere infinite rewards and
            bad offsets go unnoticed.
        RuntimeError: ``impl="native"`` where the library is not built.
    """
    arguments = checks.Arguments()
    arguments.tensor(
        "rewards", rewards, "B" if isinstance(rewards, Tensor) and rewards.dim() == 1 else "B K", "floating"
    )
    checks.choice("scale", scale, ("group", "batch", "none"))
    checks.number("epsilon", epsilon)
    table = rewards if rewards.dim() == 2 else rewards[:, None]
    if table.shape[1] == 0:
        raise ValueError("rewards: has no component (K is 0); pass [B] or [B, K] with K >= 1")
    if checks.on_host(table) and bool(table.isinf().any()):
        raise ValueError("rewards: holds an infinite value; use NaN for a component that does not apply")
    if weights is not None:
        if rewards.dim() == 1:
            raise ValueError("weights: rewards [B] have no components; pass rewards [B, K], or scale them yourself")
        arguments.tensor("weights", weights, "K", "floating")
        checks.finite("weights", weights, "use 0 to leave a component out")
    if isinstance(groups, Tensor):
        arguments.offsets("groups", groups, "P", "B")
        offsets = groups.to(torch.int64)
    else:
        checks.positive_int("groups", groups)
        if table.shape[0] % groups:
            raise ValueError(
                f"groups: {table.shape[0]} rewards do not divide into groups of {groups}; "
                "pass offsets [P + 1] for groups of different sizes"
            )
        offsets = torch.arange(0, table.shape[0] + 1, groups, device=table.device)

    compute = native if group_advantage_impl(rewards, impl) == "native" else reference
    table = table.to(reference.compute_dtype(table))
    weights = None if weights is None else weights.to(table.dtype)
    result = GroupAdvantage(*compute.group_advantage(table, offsets, weights, scale, float(epsilon)))
    # Finite inputs end here only when a weighted sum overflowed its dtype.
    checks.finite("rewards", result.advantages, "its weighted sum overflows; scale rewards or weights down")
    return result


def group_advantage_impl(rewards: Tensor, impl: Impl = "auto") -> Literal["native", "reference"]:
    """Which implementation ``group_advantage`` uses for these rewards.

    Raises:
        ValueError: ``impl`` is unknown, or ``"native"`` for rewards that are not on a CPU or are float64.
        RuntimeError: ``impl="native"`` where the library is not built.
    """
    checks.choice("impl", impl, ("auto", "native", "reference"))
    fits = checks.on_host(rewards) and rewards.dtype != torch.float64
    if impl == "native" and not fits:
        raise ValueError(
            f"impl: 'native' takes float32 rewards on a CPU, got {rewards.dtype} on {rewards.device}; pass 'auto'"
        )
    if impl == "native":
        return "native"
    return "native" if impl == "auto" and fits and native.available() else "reference"
