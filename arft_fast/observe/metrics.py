"""Figures of a batch of groups, under the names that TRL gives them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from arft_fast.trajectory import Ending, Group


def group_metrics(groups: Sequence[Group], weights: Mapping[str, float]) -> dict[str, float]:
    """What a batch did: rewards, lengths, tools.

    Trajectories that the world broke (``Ending.INFRA_FAULT``) are counted in ``rollout/infra_failed`` and enter
    nothing else. A figure that nothing was measured for is nan, so that every step has the same names.

    Args:
        groups: P groups of up to G trajectories, rewards filled in.
        weights: weight of each reward component in the total. A component without a weight is reported alone; a
            trajectory without a component (a mixed batch) adds nothing to its mean.

    Returns:
        ``reward`` mean weighted total; ``reward_std`` mean over groups of the sample standard deviation (ddof 1);
        ``frac_reward_zero_std`` share of groups without a signal; ``rewards/<name>/mean`` and ``/std`` over the batch;
        ``completions/{mean,min,max}_length`` in tokens that the policy sampled; ``completions/clipped_ratio`` share
        that ran out of tokens; ``tools/call_frequency`` calls a trajectory; ``tools/failure_frequency`` share of the
        calls that failed; ``num_tokens`` tokens of this batch, prompts and observations included (TRL sums it over
        steps); ``rollout/infra_failed`` a count.
    """
    sound = [[t for t in group.trajectories if not t.infra_failed] for group in groups]
    trajectories = [t for group in sound for t in group]
    totals = [np.array([t.total_reward(weights) for t in group]) for group in sound if group]
    # One trajectory alone has nothing to be compared with: no signal, not an unknown one.
    stds = [float(total.std(ddof=1)) if len(total) > 1 else 0.0 for total in totals]
    lengths = [t.completion_length for t in trajectories]
    calls = [turn for t in trajectories for turn in t.observations() if turn.tool is not None]

    metrics = {
        "reward": _mean(np.concatenate(totals) if totals else []),
        "reward_std": _mean(stds),
        "frac_reward_zero_std": _mean([math.isclose(std, 0.0, abs_tol=1e-8) for std in stds]),
    }
    for name in sorted({*weights, *(name for t in trajectories for name in t.rewards)}):
        values = [t.rewards[name] for t in trajectories if name in t.rewards]
        metrics[f"rewards/{name}/mean"] = _mean(values)
        metrics[f"rewards/{name}/std"] = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return metrics | {
        "completions/mean_length": _mean(lengths),
        "completions/min_length": float(min(lengths, default=math.nan)),
        "completions/max_length": float(max(lengths, default=math.nan)),
        "completions/clipped_ratio": _mean([t.ending is Ending.MAX_TOKENS for t in trajectories]),
        "tools/call_frequency": len(calls) / len(trajectories) if trajectories else math.nan,
        "tools/failure_frequency": _mean([turn.failed for turn in calls]),
        "num_tokens": float(sum(len(t.token_ids) for t in trajectories)),
        "rollout/infra_failed": float(sum(len(group.trajectories) for group in groups) - len(trajectories)),
    }


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else math.nan
