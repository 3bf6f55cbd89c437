"""From the arguments of ``policy_loss`` to an ``Objective`` and its ``Rows``: checks, defaults and reductions."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from . import checks
from .objective import FAMILY, LEVELS, REDUCTIONS, Level, Loss, Objective, Reduction, Rows
from .rows import KLS, Kl, RowObjective, SamplerCorrection
from .shared_rows import read, read_by

Correction = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
_CORRECTIONS: dict[Correction, tuple[Level, SamplerCorrection]] = {
    "none": ("token", "none"),
    "token_truncate": ("token", "truncate"),
    "token_mask": ("token", "mask"),
    "sequence_truncate": ("sequence", "truncate"),
    "sequence_mask": ("sequence", "mask"),
}


def resolve_objective(
    *,
    loss: Loss,
    level: Level | None,
    reduction: Reduction | None,
    epsilon_low: float,
    epsilon_high: float | None,
    delta: float | None,
    dual_clip: float | None,
    sapo_temperatures: tuple[float, float],
    beta: float,
    kl: Kl,
    kl_correction: bool,
    entropy_coef: float,
    top_entropy_quantile: float,
    sampler_correction: Correction,
    sampler_clip: tuple[float, float],
    has_ref: bool,
    has_sampler: bool,
    has_sequences: bool,
    has_denominator: bool,
) -> tuple[Objective, Reduction]:
    """The objective that the settings of ``policy_loss`` describe, and its reduction."""
    checks.choice("loss", loss, FAMILY)
    family = FAMILY[loss]
    level, reduction = level or family.level, reduction or family.reduction
    checks.choice("level", level, LEVELS)
    checks.choice("reduction", reduction, REDUCTIONS)
    checks.choice("kl", kl, KLS)
    checks.choice("sampler_correction", sampler_correction, _CORRECTIONS)
    epsilon_high = epsilon_low if epsilon_high is None else epsilon_high
    for name, value in (("epsilon_low", epsilon_low), ("epsilon_high", epsilon_high)):
        checks.number(name, value)
    for name, value in (("beta", beta), ("entropy_coef", entropy_coef)):
        checks.number(name, value, zero=True)
    if delta is not None:
        checks.number("delta", delta)
    if dual_clip is not None:
        checks.number("dual_clip", dual_clip)
        if dual_clip <= 1:
            raise ValueError(f"dual_clip: must be > 1, got {dual_clip}; it bounds ratios that have grown")
    checks.pair("sapo_temperatures", sapo_temperatures)
    for tau in sapo_temperatures:
        checks.number("sapo_temperatures", tau)
    checks.pair("sampler_clip", sampler_clip)
    if not 0 <= sampler_clip[0] < sampler_clip[1]:
        raise ValueError(f"sampler_clip: must be (low, high) with 0 <= low < high, got {sampler_clip}")
    checks.number("top_entropy_quantile", top_entropy_quantile)
    if top_entropy_quantile > 1:
        raise ValueError(f"top_entropy_quantile: is a share of the tokens, at most 1, got {top_entropy_quantile}")
    if beta > 0 and not has_ref:
        raise ValueError(
            "ref_logprobs: needed when beta > 0; score the tokens with the reference policy (linear_logprob under "
            "torch.no_grad()), or pass beta=0"
        )
    sampler_level, correction = _CORRECTIONS[sampler_correction]
    if correction != "none" and not has_sampler:
        raise ValueError(f"sampler_logprobs: needed for sampler_correction={sampler_correction!r}; pass the engine's")
    gmpo = family.surrogate == "gmpo"
    if gmpo and level != "sequence":
        raise ValueError("level: the geometric mean of loss='gmpo' is over the sequence; leave level out")
    coupled = level == "sequence" or reduction == "sequence_mean" or sampler_level == "sequence"
    if coupled and not has_sequences:
        raise ValueError(
            "cu_seqlens: needed for what is per sequence (level, reduction or sampler_correction); pass the offsets, "
            "or level='token' and reduction='token_mean'"
        )
    if not has_denominator and reduction == "sequence_sum" and (loss == "dr_grpo" or not has_sequences):
        raise ValueError(
            "denominator: has no default here; pass the number of sequences times the longest completion (dr_grpo), or "
            "the number of sequences"
        )
    row = RowObjective(
        surrogate="clip" if family.surrogate == "gmpo" else family.surrogate,
        ratio_low=1.0 - epsilon_low,
        ratio_high=1.0 + epsilon_high,
        delta=math.inf if delta is None else float(delta),
        dual_clip=math.inf if dual_clip is None else float(dual_clip),
        sapo_positive=float(sapo_temperatures[0]),
        sapo_negative=float(sapo_temperatures[1]),
        kl=kl,
        beta=float(beta),
        kl_correction=bool(kl_correction),
        entropy_coef=float(entropy_coef),
        sampler=correction,
        sampler_low=float(sampler_clip[0]),
        sampler_high=float(sampler_clip[1]),
    )
    objective = Objective(
        row=row,
        gmpo=gmpo,
        level=level,
        sampler_level=sampler_level,
        top_entropy_quantile=float(top_entropy_quantile),
    )
    return objective, reduction


def resolve_rows(
    arguments: checks.Arguments,
    dtype: torch.dtype,
    reduction: Reduction,
    denominator: float | Tensor | None,
    advantages: Tensor,
    *,
    row_index: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    old: Tensor | None,
    ref: Tensor | None,
    sampler: Tensor | None,
    weight: Tensor | None,
) -> Rows:
    """Check the per-token and per-sequence tensors and bring each to [N] in ``dtype``; no gradient comes with them."""
    tokens = arguments.size("N")
    if mask is not None:
        arguments.tensor("mask", mask, "N", "boolean")
    if cu_seqlens is not None:
        arguments.offsets("cu_seqlens", cu_seqlens, "B", "N")
    per_sequence = cu_seqlens is not None and (
        not isinstance(advantages, Tensor) or advantages.shape[:1] != (tokens,) or tokens == arguments.size("B")
    )
    arguments.tensor("advantages", advantages, "B" if per_sequence else "N", "floating")
    checks.finite("advantages", advantages, "masked trajectories have advantage 0 (see group_advantage)")
    device = advantages.device
    kept = torch.ones(tokens, dtype=torch.bool, device=device) if mask is None else mask
    remedy = "score it with the bias and temperature of the sampler"
    for name, values in (("old_logprobs", old), ("sampler_logprobs", sampler)):
        if values is not None:
            arguments.tensor(name, values, "N", "floating")
            checks.finite(name, values, remedy, where=kept)
    if ref is not None:
        arguments.tensor("ref_logprobs", ref, "N" if row_index is None else "M", "floating")
        checks.finite("ref_logprobs", ref, remedy, where=read_by(kept, row_index, len(ref)))
        ref = read(ref.detach(), row_index)
    if weight is not None:
        arguments.tensor("sampler_weights", weight, "N", "floating")
        checks.finite("sampler_weights", weight, "use 0 to leave a token out", where=mask)
        checks.not_negative("sampler_weights", weight, where=mask)

    if cu_seqlens is None:
        sequence, sequences = torch.zeros(tokens, dtype=torch.int64, device=device), 1
    else:
        sequences = cu_seqlens.shape[0] - 1
        sequence = torch.repeat_interleave(
            torch.arange(sequences, device=device), cu_seqlens.diff().long(), output_size=tokens
        )
    lengths = torch.zeros(sequences, dtype=dtype, device=device).index_add(0, sequence, kept.to(dtype)).clamp(min=1)
    if denominator is None:
        denominator = kept.sum().clamp(min=1).to(dtype) if reduction == "token_mean" else float(max(1, sequences))
    elif isinstance(denominator, Tensor):
        arguments.tensor("denominator", denominator, "", "floating")
    else:
        checks.number("denominator", denominator)
    scale = kept.to(dtype) / denominator
    if reduction == "sequence_mean":
        scale = scale / lengths[sequence]

    def vector(values: Tensor | None) -> Tensor | None:
        return None if values is None else torch.where(kept, values.detach().to(dtype), 0.0)

    advantage = vector(advantages[sequence] if per_sequence else advantages)
    assert advantage is not None
    return Rows(advantage, scale, sequence, lengths, vector(old), vector(ref), vector(sampler), vector(weight))
