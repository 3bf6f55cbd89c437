"""What a row kernel has to return (``arft_fast/kernels/rows.py``), by autograd on plain PyTorch in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from arft_fast.kernels.rows import RowObjective, Transform, Vectors

PLAIN = Transform()
CLIP = RowObjective()


class Case(NamedTuple):
    """Rows [C, V] and what is asked of them."""

    logits: Tensor
    token_ids: Tensor
    bias: Tensor | None
    transform: Transform
    objective: RowObjective
    vectors: Vectors

    def to(self, dtype: torch.dtype, logits_dtype: torch.dtype | None = None) -> Case:
        bias, *vectors = (None if v is None else v.to(dtype) for v in (self.bias, *self.vectors))
        return self._replace(logits=self.logits.to(logits_dtype or dtype), bias=bias, vectors=Vectors(*vectors))


class Results(NamedTuple):
    logprobs: Tensor
    entropy: Tensor
    coefficient: Tensor
    gradient: Tensor


def make_case(
    rows: int,
    vocabulary: int,
    transform: Transform = PLAIN,
    objective: RowObjective = CLIP,
    *,
    spread: float = 3.0,
    biased: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> Case:
    """A float64 case with float32 values. Log-ratios go past every bound; with a bias some ids are forbidden."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(device, torch.float64)

    token_ids = torch.randint(vocabulary, (rows,), generator=random).to(device)
    forbidden = normal(vocabulary) < -0.8
    forbidden[token_ids] = False
    bias = normal(vocabulary).masked_fill(forbidden, -math.inf) if biased else None
    scale = 0.25 + torch.rand(rows, generator=random).to(device, torch.float64)
    case = Case(spread * normal(rows, vocabulary), token_ids, bias, transform, objective, Vectors(normal(rows), scale))
    logp = log_softmax(case.logits, case)[torch.arange(rows), token_ids]
    old, ref, sampler = (logp - 0.5 * normal(rows) for _ in range(3))
    vectors = Vectors(case.vectors.advantage, scale, *(v.float().double() for v in (old, ref, sampler)))
    return case._replace(vectors=vectors)


def log_softmax(logits: Tensor, case: Case) -> Tensor:
    """Log-probs [C, V] of all ids; -inf for forbidden ones, and no gradient through them."""
    x = logits if case.bias is None else logits + case.bias
    forbidden = x == -math.inf
    y = x.masked_fill(forbidden, 0.0) * case.transform.logit_scale
    if case.transform.softcap > 0:
        y = torch.tanh(y / case.transform.softcap) * case.transform.softcap
    return (y / case.transform.temperature).masked_fill(forbidden, -math.inf).log_softmax(dim=1)


def log_softmax_at_tokens(logits: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """Log-prob of the token [C] and entropy [C]."""
    logp = log_softmax(logits, case)
    entropy = -(logp.exp() * logp.masked_fill(logp == -math.inf, 0.0)).sum(dim=1)
    return logp.gather(1, case.token_ids.long()[:, None])[:, 0], entropy


def row_losses(logp: Tensor, objective: RowObjective, vectors: Vectors) -> Tensor:
    """Losses [C] whose derivatives are the coefficients; without the entropy bonus."""
    log_ratio = logp - (logp.detach() if vectors.old is None else vectors.old)
    ratio = log_ratio.clamp(-20, 20).exp()
    advantage, band = vectors.advantage, ratio.clamp(objective.ratio_low, objective.ratio_high)
    if objective.surrogate == "clip":
        gain = torch.minimum(ratio.clamp(max=objective.delta) * advantage, band * advantage)
        if objective.dual_clip < math.inf:
            gain = torch.where(advantage < 0, torch.maximum(gain, objective.dual_clip * advantage), gain)
    elif objective.surrogate == "cispo":
        gain = band.detach() * advantage * logp
    else:
        taus = advantage.new_tensor([objective.sapo_negative, objective.sapo_positive])
        tau = taus[(advantage > 0).long()]
        gain = 4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantage
    if objective.sampler != "none":
        assert vectors.sampler is not None
        weight = (logp.detach() - vectors.sampler).clamp(-20, 20).exp()
        bounded = weight.clamp(objective.sampler_low, objective.sampler_high)
        gain = gain * (bounded if objective.sampler == "truncate" else torch.where(bounded == weight, weight, 0.0))
    loss = -gain
    if vectors.ref is not None and objective.beta > 0:
        gap = vectors.ref - logp
        near = gap.clamp(-20, 20)
        kl = {"k1": -gap, "k2": gap.square() / 2, "k3": near.expm1() - near}[objective.kl]
        loss = loss + objective.beta * kl * (ratio if objective.kl_correction else 1.0)
    return vectors.scale * loss


def truth(case: Case) -> Results:
    """All results in float64."""
    case = case.to(torch.float64)
    logits = case.logits.clone().requires_grad_()
    logp, entropy = log_softmax_at_tokens(logits, case)
    losses = row_losses(logp, case.objective, case.vectors)
    (coefficient,) = torch.autograd.grad(losses.sum(), logp, retain_graph=True)
    bonus = case.objective.entropy_coef * case.vectors.scale * entropy
    (gradient,) = torch.autograd.grad((losses - bonus).sum(), logits)
    return Results(logp.detach(), entropy.detach(), coefficient, gradient)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Root mean square of the error over that of ``want``; infinite where a NaN is."""
    got, want = got.detach().double(), want.detach().double()
    error = float((got - want).norm() / want.norm().clamp(min=1e-300))
    return math.inf if math.isnan(error) else error


def assert_close(got: Results, want: Results, forward: float, backward: float) -> None:
    """Bounds on the relative error of log-probs and entropy, and of coefficients and gradient."""
    for name, bound in zip(Results._fields, (forward, forward, backward, backward), strict=True):
        error = relative_error(getattr(got, name), getattr(want, name))
        assert error <= bound, f"{name}: relative error {error:.2e} > {bound:.0e}"
