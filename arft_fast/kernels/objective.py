"""The policy objectives, each defined once: losses of single tokens from their log-probs, as differentiable PyTorch.

Everything here works on vectors [N], a few kilobytes beside the logits. It gives the loss its value and statistics
under every ``impl``, and the gradient wherever a row alone cannot decide it; row kernels repeat only ``RowObjective``.

Dimension letters: N rows (sampled tokens), B sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .rows import KLS, MAX_LOG_RATIO, SAMPLER_CORRECTIONS, SURROGATES, RowObjective, Vectors
from .shared_rows import add_up, read

Loss = Literal["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "gmpo"]
Level = Literal["token", "sequence"]
Reduction = Literal["sequence_mean", "sequence_sum", "token_mean"]

LEVELS: tuple[Level, ...] = ("token", "sequence")
REDUCTIONS: tuple[Reduction, ...] = ("sequence_mean", "sequence_sum", "token_mean")


class Family(NamedTuple):
    """What the name of a loss stands for; ``level`` and ``reduction`` are defaults that the caller may change."""

    surrogate: Literal["clip", "cispo", "sapo", "gmpo"]
    level: Level
    reduction: Reduction


FAMILY: dict[Loss, Family] = {
    "grpo": Family("clip", "token", "sequence_mean"),  # arXiv 2402.03300
    "bnpo": Family("clip", "token", "token_mean"),  # by the tokens of this batch
    "dr_grpo": Family("clip", "token", "sequence_sum"),  # arXiv 2503.20783; denominator B x longest completion
    "dapo": Family("clip", "token", "token_mean"),  # arXiv 2503.14476; denominator: tokens of the whole step
    "gspo": Family("clip", "sequence", "sequence_mean"),  # arXiv 2507.18071
    "cispo": Family("cispo", "token", "token_mean"),  # arXiv 2506.13585
    "sapo": Family("sapo", "token", "sequence_mean"),  # arXiv 2511.20347
    "gmpo": Family("gmpo", "sequence", "sequence_mean"),  # arXiv 2507.20673
}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A loss with all of its settings; see ``arft_fast.policy_loss`` for what each means."""

    row: RowObjective = field(default_factory=RowObjective)
    gmpo: bool = False
    """The geometric mean over the sequence takes the place of ``row.surrogate``."""
    level: Level = "token"
    sampler_level: Level = "token"
    top_entropy_quantile: float = 1.0

    def to_numbers(self) -> list[float]:
        """As plain numbers, the form that passes through a ``torch.library`` schema."""
        row = replace(self.row)
        numbers = [_CODES[value] if isinstance(value, str) else float(value) for value in astuple(row)]
        return [*numbers, float(self.gmpo), _CODES[self.level], _CODES[self.sampler_level], self.top_entropy_quantile]

    @staticmethod
    def from_numbers(numbers: Sequence[float]) -> Objective:
        """What ``to_numbers`` wrote."""
        names = [f.name for f in fields(RowObjective)]
        row: dict[str, object] = dict(zip(names, numbers, strict=False))
        for name, choices in (("surrogate", SURROGATES), ("kl", KLS), ("sampler", SAMPLER_CORRECTIONS)):
            row[name] = choices[int(numbers[names.index(name)])]
        row["kl_correction"] = bool(row["kl_correction"])
        gmpo, level, sampler_level, quantile = numbers[len(names) :]
        return Objective(
            row=RowObjective(**row),  # type: ignore[arg-type]
            gmpo=bool(gmpo),
            level=LEVELS[int(level)],
            sampler_level=LEVELS[int(sampler_level)],
            top_entropy_quantile=quantile,
        )


_CODES: dict[str, float] = {
    name: float(i) for choices in (SURROGATES, KLS, SAMPLER_CORRECTIONS, LEVELS) for i, name in enumerate(choices)
}


class Rows(NamedTuple):
    """Per-token inputs [N] of an objective, in the dtype of the log-probs, none with a gradient."""

    advantage: Tensor
    scale: Tensor
    """Weight of the token in the loss: mask, reduction and denominator in one; 0 for masked tokens."""
    sequence: Tensor
    """int64: the token's sequence, 0 .. B - 1."""
    lengths: Tensor
    """[B] unmasked tokens of each sequence, at least 1."""
    old: Tensor | None = None
    ref: Tensor | None = None
    sampler: Tensor | None = None
    weight: Tensor | None = None
    """The caller's own importance weights."""

    def sequence_sum(self, values: Tensor) -> Tensor:
        """[N]: sum of ``values`` over the unmasked tokens of each token's sequence."""
        kept = torch.where(self.scale != 0, values, 0.0)
        return read(add_up(kept, self.sequence, len(self.lengths)), self.sequence)

    def sequence_mean(self, values: Tensor) -> Tensor:
        """[N]: mean of ``values`` over the unmasked tokens of each token's sequence."""
        return self.sequence_sum(values) / self.lengths[self.sequence]


class Terms(NamedTuple):
    """What an objective makes of each token [N]."""

    loss: Tensor
    """To be multiplied by ``scale`` and summed."""
    kl: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


def policy_terms(logprobs: Tensor, entropy: Tensor, rows: Rows, objective: Objective) -> Terms:
    """Loss of each token, differentiable in ``logprobs`` and ``entropy`` [N].

    The order is that of the published trainers: surrogate x entropy mask x sampler weight + beta x KL - coefficient x
    entropy (the last on tokens that the entropy mask keeps).
    """
    row = objective.row
    anchor = logprobs.detach() if rows.old is None else rows.old
    log_ratio = logprobs - anchor
    if objective.level == "sequence" and not objective.gmpo:
        log_ratio = rows.sequence_mean(log_ratio)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    kept = _top_entropy(entropy.detach(), rows, objective)

    surrogate = _surrogate(logprobs, log_ratio, ratio, rows, objective) * _sampler_weight(anchor, rows, objective)
    loss = -torch.where(kept, surrogate, 0.0)
    kl = torch.zeros_like(entropy) if rows.ref is None else _kl(rows.ref - logprobs, row.kl)
    if row.kl_correction:
        kl = kl * ratio
    if row.beta > 0:
        loss = loss + row.beta * kl
    if row.entropy_coef > 0:
        loss = loss - row.entropy_coef * torch.where(kept, entropy, 0.0)
    if row.surrogate == "sapo" and not objective.gmpo:
        low = high = torch.zeros_like(kept)
    elif objective.gmpo:
        inside = log_ratio.detach()
        low = (inside < row.ratio_low - 1) & (rows.advantage < 0)
        high = (inside > row.ratio_high - 1) & (rows.advantage > 0)
    else:
        low = (ratio.detach() < row.ratio_low) & (rows.advantage < 0)
        high = (ratio.detach() > row.ratio_high) & (rows.advantage > 0)
    return Terms(loss, kl.detach(), ratio.detach(), low, high)


def _surrogate(logprobs: Tensor, log_ratio: Tensor, ratio: Tensor, rows: Rows, objective: Objective) -> Tensor:
    row, advantage = objective.row, rows.advantage
    if objective.gmpo:
        # Equation 4 of arXiv 2507.20673: clip in log space on the side that the advantage's sign makes pessimistic.
        sign = torch.sign(advantage)
        bounded = log_ratio.clamp(row.ratio_low - 1, row.ratio_high - 1)
        pessimistic = sign * torch.minimum(sign * log_ratio, sign * bounded)
        return advantage * rows.sequence_mean(pessimistic).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if row.surrogate == "cispo":
        return ratio.detach().clamp(row.ratio_low, row.ratio_high) * advantage * logprobs
    if row.surrogate == "sapo":
        tau = torch.full_like(advantage, row.sapo_negative).masked_fill(advantage > 0, row.sapo_positive)
        return torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantage
    free, bounded = ratio.clamp(max=row.delta), ratio.clamp(row.ratio_low, row.ratio_high)
    surrogate = torch.minimum(free * advantage, bounded * advantage)
    if row.dual_clip < math.inf:  # arXiv 1912.09729, equation 5
        surrogate = torch.where(advantage < 0, torch.maximum(surrogate, row.dual_clip * advantage), surrogate)
    return surrogate


def _kl(gap: Tensor, kind: str) -> Tensor:
    """Estimate of the KL to the reference from ``gap = ref - logp`` (Schulman, Approximating KL divergence, 2020)."""
    if kind == "k1":
        return -gap
    if kind == "k2":
        return gap.square() / 2
    gap = gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return gap.expm1() - gap


def _top_entropy(entropy: Tensor, rows: Rows, objective: Objective) -> Tensor:
    """[N] bool: tokens among the ``top_entropy_quantile`` of highest entropy (arXiv 2506.01939)."""
    if objective.top_entropy_quantile >= 1.0:
        return torch.ones_like(entropy, dtype=torch.bool)
    live = torch.where(rows.scale != 0, entropy, math.nan)
    return entropy >= torch.cat([live, live.new_full((1,), math.nan)]).nanquantile(1.0 - objective.top_entropy_quantile)


def _sampler_weight(anchor: Tensor, rows: Rows, objective: Objective) -> Tensor | float:
    """[N] importance weight from the engine's distribution to the trainer's ``anchor``, a constant."""
    row = objective.row
    weight: Tensor | float = 1.0 if rows.weight is None else rows.weight
    if row.sampler == "none":
        return weight
    assert rows.sampler is not None, "checked by the caller"
    gap = anchor.detach() - rows.sampler
    if objective.sampler_level == "sequence":
        gap = rows.sequence_sum(gap)
    ratio = gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if row.sampler == "truncate":
        return weight * ratio.clamp(row.sampler_low, row.sampler_high)
    return weight * torch.where((ratio >= row.sampler_low) & (ratio <= row.sampler_high), ratio, 0.0)


def weighted_sum(loss: Tensor, rows: Rows) -> Tensor:
    """``sum_i scale_i loss_i`` over the unmasked tokens; what stands in masked ones (NaN, say) is not looked at."""
    return torch.where(rows.scale != 0, loss * rows.scale, 0.0).sum()


def row_problem(rows: Rows, objective: Objective) -> tuple[RowObjective, Vectors] | None:
    """The same gradient as a matter of single rows, or None where tokens of a sequence depend on each other.

    On-policy (no ``old``) a sequence's ratio is 1 whatever its tokens are, so that a sequence-level loss too is decided
    row by row: each token gets the mean over its sequence of advantage x weight x scale.
    """
    row = objective.row
    on_policy = rows.old is None
    coupled_ratio = objective.level == "sequence" and (not on_policy or (row.kl_correction and row.beta > 0))
    coupled_sampler = row.sampler != "none" and on_policy and (objective.sampler_level == "sequence" or objective.gmpo)
    averaged = objective.gmpo or (objective.level == "sequence" and row.surrogate != "cispo")
    if coupled_ratio or coupled_sampler or objective.top_entropy_quantile < 1.0:
        return None
    if averaged and row.sampler != "none":
        return None

    advantage, sampler = rows.advantage, rows.sampler if row.sampler != "none" else None
    if rows.old is not None:
        advantage, sampler, row = (
            advantage * _sampler_weight(rows.old, rows, objective),
            None,
            replace(row, sampler="none"),
        )
    else:  # at ratio 1 every surrogate has the slope A, but for a cap below 1
        if row.surrogate == "clip" and not objective.gmpo and row.delta < 1:
            advantage = advantage.clamp(max=0)
        if rows.weight is not None:
            advantage = advantage * rows.weight
        row = replace(row, surrogate="clip", delta=math.inf, dual_clip=math.inf)
    if averaged:
        live = rows.scale != 0
        advantage = torch.where(
            live, rows.sequence_mean(advantage * rows.scale) / torch.where(live, rows.scale, 1.0), 0.0
        )
    return row, Vectors(advantage, rows.scale, rows.old, rows.ref if row.beta > 0 else None, sampler)


def known_without_gradient(rows: Rows, objective: Objective) -> Tensor:
    """[N] bool: tokens whose gradient is zero whatever their logits are, and that no other token's gradient needs."""
    masked = rows.scale == 0
    row = objective.row
    if row.beta > 0 or row.entropy_coef > 0 or objective.top_entropy_quantile < 1.0:
        return masked
    pull = rows.advantage if rows.weight is None else rows.advantage * rows.weight
    weighs = row.sampler != "none" and objective.sampler_level == "sequence" and rows.old is None
    # A token without pull still moves its sequence's ratio, or its sequence's weight.
    if objective.level == "sequence" or objective.gmpo or weighs:
        pull = rows.sequence_sum(pull.abs())
    return masked | (pull == 0)


@torch.no_grad()
def statistics(
    logprobs: Tensor, entropy: Tensor, coefficient: Tensor, measured: Tensor, rows: Rows, objective: Objective
) -> dict[str, Tensor]:
    """Means over the ``measured`` tokens [N]; see ``arft_fast.policy_loss``."""
    terms = policy_terms(logprobs, entropy, rows, replace(objective, top_entropy_quantile=1.0))
    count = measured.sum()

    def mean(values: Tensor) -> Tensor:
        return torch.where(measured, values, 0.0).sum() / count.clamp(min=1)

    sampler_gap = torch.zeros_like(logprobs) if rows.sampler is None else (logprobs - rows.sampler).abs()
    return {
        "entropy": mean(entropy),
        "kl": mean(terms.kl),
        "clip_ratio/low_mean": mean(terms.clipped_low),
        "clip_ratio/high_mean": mean(terms.clipped_high),
        "ratio_max": torch.cat([torch.where(measured, terms.ratio, 0.0), terms.ratio.new_zeros(1)]).max(),
        "sampler_gap": mean(sampler_gap),
        "tokens": count.to(logprobs.dtype),
        "gradient_rows": (coefficient != 0).sum().to(logprobs.dtype),
    }
