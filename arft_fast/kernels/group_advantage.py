"""Group-relative advantages. Dimension letters: B trajectories, P groups, G samples of a group, K reward components."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import checks, native, triton_support
from .group_advantage_reference import CENTERS, ORDERS, SCALES, Center, Normalization, Order, Scale
from .group_advantage_reference import group_advantage as _reference

Impl = Literal["auto", "triton", "native", "reference"]
IMPLS: tuple[Impl, ...] = ("auto", "triton", "native", "reference")


class GroupAdvantage(NamedTuple):
    """What ``group_advantage`` returns."""

    advantages: Tensor
    """[B]; 0 for trajectories that are left out."""
    mean: Tensor
    """[P] mean combined reward of each group's valid rows; NaN without one (nothing was scored, so it is not 0)."""
    std: Tensor
    """[P] std (ddof 1) of the combined reward of each group's valid rows, in every mode; 0 with fewer than two."""
    no_signal: Tensor
    """[P] bool; True where every advantage of the group is exactly 0, so that its policy gradient is too."""


def group_advantage(
    rewards: Tensor,
    groups: int | Tensor,
    *,
    weights: Tensor | None = None,
    gates: Mapping[int, tuple[int, float]] | None = None,
    center: Center = "mean",
    scale: Scale = "group",
    order: Order = "sum_then_normalize",
    whiten: bool | None = None,
    std_floor: float = 0.0,
    epsilon: float = 1e-4,
    impl: Impl = "auto",
) -> GroupAdvantage:
    """``A_i = (r_i - mean(r_group)) / (std(r_group) + epsilon)`` with ``r_i = sum_k weights[k] * rewards[i, k]``.

    That is GRPO's outcome supervision (arXiv 2402.03300, section 4.1.2), the default. With ``N`` the centring and
    scaling within a group::

        "sum_then_normalize":  A_i = N(r)_i
        "normalize_then_sum":  A_i = sum_k weights[k] * N(rewards[:, k])_i     (GDPO, arXiv 2601.05242)

    The std has ddof 1. A NaN component is "not applicable": it counts 0 and is in no mean or std; a row of only NaN (a
    masked trajectory) is left out of everything and gets 0. Equal values of a group are centred to exactly 0, however
    their mean rounds: a group whose rewards are all equal gets no gradient.

    Args:
        rewards: [B] or [B, K] floating, NaN as above.
        groups: the size G of every group (consecutive rows), or offsets [P + 1] of groups of any size: group p holds
            the rows ``groups[p] .. groups[p + 1] - 1``.
        weights: [K] floating; None: ones.
        gates: ``{k: (by, threshold)}``: component k counts 0 in rows with ``rewards[i, by] < threshold`` (it still
            applies there). Gates read the rewards as given, in their dtype; a NaN in ``by`` leaves the gate open.
        center: subtract the mean of the group (``"mean"``), of the other rows of the group (``"leave_one_out"``: RLOO,
            arXiv 2402.14740), or nothing (``"none"``; a constant group is then divided by ``std_floor + epsilon``).
        scale: divide by the std of the group (``"group"``), of all valid rows (``"batch"``), or not at all
            (``"none"``: Dr. GRPO, arXiv 2503.20783).
        order: see above.
        whiten: divide the advantages by (their std over all valid rows + epsilon), and with ``center="none"`` subtract
            their mean first. Centred advantages have mean 0 already; subtracting its rounding error would turn the
            exact zeros of groups without signal into noise. None: with ``"normalize_then_sum"`` only, as in GDPO.
        std_floor: lower bound of the std that ``scale`` divides by (before epsilon is added).
        epsilon: added to a std before the division.
        impl: ``"triton"``: one program a group, CUDA; ``"native"``: the C++ library, float32 on a CPU;
            ``"reference"``: PyTorch anywhere; ``"auto"``: the first of these that applies and is installed
            (``group_advantage_impl`` says which).

    Returns:
        float64 tensors for float64 rewards, else float32. No gradient flows through them.

    Raises:
        TypeError: a dtype or type is wrong.
        ValueError: a shape, device or value is wrong. Values are read on a CPU and outside ``torch.compile`` only;
            elsewhere infinite rewards and bad offsets go unnoticed.
        RuntimeError: ``impl`` names an implementation that is not built or not installed.
    """
    arguments = checks.Arguments()
    arguments.tensor(
        "rewards", rewards, "B" if isinstance(rewards, Tensor) and rewards.dim() == 1 else "B K", "floating"
    )
    checks.choice("center", center, CENTERS)
    checks.choice("scale", scale, SCALES)
    checks.choice("order", order, ORDERS)
    if whiten is not None and not isinstance(whiten, bool):
        raise TypeError(f"whiten: expected True, False or None, got {type(whiten).__name__}")
    checks.number("std_floor", std_floor, zero=True)
    checks.number("epsilon", epsilon)
    checks.choice("impl", impl, IMPLS)
    if not torch.compiler.is_compiling():  # the operator asks again, outside of the trace
        group_advantage_impl(rewards, impl)
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
    gate_by, gate_threshold = _gates(gates, rewards)
    if isinstance(groups, Tensor):
        arguments.offsets("groups", groups, "P", "B")
        offsets = groups
    else:
        checks.positive_int("groups", groups)
        if table.shape[0] % groups:
            raise ValueError(
                f"groups: {table.shape[0]} rewards do not divide into groups of {groups}; "
                "pass offsets [P + 1] for groups of different sizes"
            )
        offsets = torch.arange(0, table.shape[0] + 1, groups, device=table.device)

    result = GroupAdvantage(
        *_operator(
            table.detach(),
            offsets,
            None if weights is None else weights.detach(),
            gate_by,
            gate_threshold,
            center,
            scale,
            order,
            order == "normalize_then_sum" if whiten is None else whiten,
            float(std_floor),
            float(epsilon),
            impl,
        )
    )
    # Finite inputs end here only when a weighted sum overflowed its dtype.
    checks.finite("rewards", result.advantages, "its weighted sum overflows; scale rewards or weights down")
    return result


def group_advantage_impl(rewards: Tensor, impl: Impl = "auto") -> Literal["triton", "native", "reference"]:
    """Which implementation ``group_advantage`` uses for these rewards.

    Raises:
        ValueError: ``impl`` is unknown, or ``"native"`` for rewards that are not on a CPU or are float64.
        RuntimeError: ``impl`` names an implementation that is not built or not installed, or cannot run here.
    """
    checks.choice("impl", impl, IMPLS)
    native_fits = rewards.device.type == "cpu" and rewards.dtype != torch.float64
    if impl == "native" and not native_fits:
        raise ValueError(
            f"impl: 'native' takes float32 rewards on a CPU, got {rewards.dtype} on {rewards.device}; pass 'auto'"
        )
    if impl == "triton" and not triton_support.available(rewards.device):
        raise RuntimeError(
            f"impl: 'triton' cannot run on {rewards.device} here (it needs a CUDA device and the triton package, or "
            "TRITON_INTERPRET=1 set before triton is imported); pass 'auto' or 'reference'"
        )
    if impl != "auto":
        return impl
    if rewards.device.type == "cuda" and triton_support.installed():
        return "triton"
    return "native" if native_fits and native.available() else "reference"


def _gates(gates: Mapping[int, tuple[int, float]] | None, rewards: Tensor) -> tuple[list[int], list[float]]:
    """The gate component [K] (-1: none) and the threshold [K] of each component; empty without gates."""
    if gates is None:
        return [], []
    if not isinstance(gates, Mapping):
        raise TypeError(f"gates: expected a mapping {{k: (by, threshold)}}, got {type(gates).__name__}")
    if rewards.dim() == 1:
        raise ValueError("gates: rewards [B] have no components; pass rewards [B, K]")
    components = rewards.shape[1]
    gate_by, gate_threshold = [-1] * components, [0.0] * components
    for k, gate in gates.items():
        if not isinstance(gate, tuple) or len(gate) != 2:
            raise TypeError(f"gates: expected (by, threshold) for component {k}, got {gate!r}")
        by, threshold = gate
        for component in (k, by):
            if not isinstance(component, int) or isinstance(component, bool):
                raise TypeError(f"gates: components are given by their index, got {component!r}")
            if not 0 <= component < components:
                raise ValueError(f"gates: no component {component}; rewards have K={components}: 0 .. {components - 1}")
        if not isinstance(threshold, int | float) or isinstance(threshold, bool):
            raise TypeError(f"gates: expected a number as threshold of component {k}, got {type(threshold).__name__}")
        if not abs(threshold) < float("inf"):
            raise ValueError(f"gates: the threshold of component {k} must be finite, got {threshold}; leave it out")
        gate_by[k], gate_threshold[k] = by, float(threshold)
    return gate_by, gate_threshold


@torch.library.custom_op("arft_fast::group_advantage", mutates_args=())
def _operator(
    rewards: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    gate_by: list[int],
    gate_threshold: list[float],
    center: str,
    scale: str,
    order: str,
    whiten: bool,
    std_floor: float,
    epsilon: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One node of a traced graph: what happens inside depends on devices and on what is built, never on the trace."""
    # Thresholds are compared in the dtype of the rewards: 0.7 must not shut out a float32 reward of 0.7.
    thresholds = torch.tensor(gate_threshold, dtype=rewards.dtype).tolist() if gate_threshold else []
    rule = Normalization(
        center=center,  # type: ignore[arg-type]
        scale=scale,  # type: ignore[arg-type]
        order=order,  # type: ignore[arg-type]
        whiten=whiten,
        std_floor=std_floor,
        epsilon=epsilon,
        gate_by=tuple(gate_by),
        gate_threshold=tuple(thresholds),
    )
    chosen = group_advantage_impl(rewards, impl)  # type: ignore[arg-type]
    if chosen == "triton":
        from .triton_group_advantage import group_advantage as compute
    else:
        compute = native.group_advantage if chosen == "native" else _reference
    dtype = _result_dtype(rewards)
    weights = None if weights is None else weights.to(dtype)
    return compute(rewards.to(dtype), offsets.to(torch.int64), weights, rule)


@_operator.register_fake
def _(rewards: Tensor, offsets: Tensor, *_settings: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, groups = rewards.shape[0], offsets.shape[0] - 1
    values = [rewards.new_empty(size, dtype=_result_dtype(rewards)) for size in (rows, groups, groups)]
    return values[0], values[1], values[2], rewards.new_empty(groups, dtype=torch.bool)


def _result_dtype(rewards: Tensor) -> torch.dtype:
    return torch.float64 if rewards.dtype == torch.float64 else torch.float32
