"""What the tests of ``group_advantage`` share: its definition as a Python loop, and how each implementation is run."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from arft_fast.kernels import GroupAdvantage, group_advantage, native, triton_support

NAN = math.nan
CENTERS = ["mean", "leave_one_out", "none"]
SCALES = ["group", "batch", "none"]
ORDERS = ["sum_then_normalize", "normalize_then_sum"]
DEVICE_OF_TRITON = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMPLS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason="not built")),
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(not triton_support.available(DEVICE_OF_TRITON), reason="no device for triton"),
    ),
]
CPU_IMPLS = IMPLS[:2]


def run(rewards, groups, *, impl="auto", weights=None, **options):
    """``group_advantage`` where ``impl`` runs, its results on the CPU."""
    device = DEVICE_OF_TRITON if impl == "triton" else torch.device("cpu")
    groups = groups.to(device) if isinstance(groups, torch.Tensor) else groups
    weights = None if weights is None else weights.to(device)
    result = group_advantage(rewards.to(device), groups, weights=weights, impl=impl, **options)
    return GroupAdvantage(*(part.cpu() for part in result))


def offsets_of(sizes):
    return torch.tensor([0, *sizes]).cumsum(0)


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=tolerance, atol=tolerance)


def present(values):
    return [value for value in values if not math.isnan(value)]


def spread(values):
    return statistics.stdev(values) if len(values) > 1 else 0.0


def advantages_by_hand(
    rows,
    sizes,
    *,
    weights=None,
    gates=None,
    center="mean",
    scale="group",
    order="sum_then_normalize",
    whiten=None,
    std_floor=0.0,
    epsilon=1e-4,
):
    """The definition on lists of floats: rows of components, NaN where one does not apply; groups of these sizes."""
    components = range(len(rows[0]))
    weights = weights or [1.0 for _ in components]
    gated = [
        [
            0.0 if not math.isnan(row[k]) and k in (gates or {}) and row[gates[k][0]] < gates[k][1] else row[k]
            for k in components
        ]
        for row in rows
    ]

    def weighted_sum(row):
        return sum(w * v for w, v in zip(weights, row, strict=True) if v == v) if present(row) else NAN

    def normalize(column):
        out = []
        for p, size in enumerate(sizes):
            group = column[sum(sizes[:p]) :][:size]
            std = spread(present(column if scale == "batch" else group))
            divisor = 1.0 if scale == "none" else max(std, std_floor) + epsilon
            for i, value in enumerate(group):
                others = present(group[:i] + group[i + 1 :])
                baseline = 0.0
                if center == "mean" and value == value:
                    baseline = statistics.fmean(present(group))
                elif center == "leave_one_out":
                    baseline = statistics.fmean(others) if others else value
                out.append((value - baseline) / divisor)
        return out

    if order == "sum_then_normalize":
        advantages = normalize([weighted_sum(row) for row in gated])
    else:
        columns = [normalize([row[k] for row in gated]) for k in components]
        advantages = [weighted_sum(row) for row in zip(*columns, strict=True)]
    if order == "normalize_then_sum" if whiten is None else whiten:
        valid = present(advantages)
        mean = statistics.fmean(valid) if center == "none" else 0.0
        advantages = [(a - mean) / (spread(valid) + epsilon) for a in advantages]
    return [0.0 if math.isnan(a) else a for a in advantages]
