"""``policy_loss`` against the losses that verl 0.9 registers, written again from their papers, sequence by sequence.

verl's ``vanilla`` with dual clip, ``gspo``, ``sapo``, ``cispo`` and ``geo_mean``, its KL and entropy terms, and the
ways in which it reduces tokens. Its conventions:

* KL and entropy are reduced like the loss, as in ours; ``sapo`` and ``geo_mean`` know one reduction only;
* sequences without tokens do not count in its means over sequences (they do in ``geo_mean``): pass their number as
  ``denominator``;
* ``gspo``'s gradient reaches each token through its own log-prob, ours through the mean over the sequence: the same
  where advantage and weight are those of the sequence. ``geo_mean`` takes the geometric mean of a sequence's weights,
  so weights are compared a sequence there too;
* verl bounds the estimate k3 by 10 and adds 1e-8 to lengths; neither is written here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from .packing import Batch, disagreement, gradients, make_batch, ours

BATCH = make_batch(seed=4)
BATCH_SIZE, LONGEST = BATCH.ids.shape
FILLED = int(BATCH.mask.any(1).sum())
LOW, HIGH, DUAL = 0.2, 0.28, 1.8
SAPO = (1.0, 1.05)
ENTROPY = 0.01
BETA = 0.05
EXACT = 1e-12
"""Relative; float64 has 1e-16, and a gradient sums about a hundred terms."""
WRONG = 1e-3
"""What any mistake makes of it, at the least."""

AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
MODES = [
    *product(("vanilla", "gspo", "cispo"), AGGREGATIONS),
    *product(("sapo", "geo_mean"), ("seq-mean-token-mean",)),
]

both = pytest.mark.parametrize("impl", ["reference", "native"], indirect=True)


@dataclass(frozen=True)
class Settings:
    """A row of the test matrix, in verl's words."""

    mode: str = "vanilla"
    aggregation: str = "token-mean"
    kl: str | None = None
    entropy: bool = False
    weights: str | None = None
    """Level of the sampler's importance weights."""
    dual: float = DUAL
    tokens: int | None = None
    """Tokens of the global batch; None: of this one."""
    sequences: int | None = None
    """Sequences of the global batch; None: those of this one that have tokens."""


def weights_of(level: str | None) -> Tensor | None:
    """Importance weights [B, T] or [B, 1]."""
    if level is None:
        return None
    width = LONGEST if level == "token" else 1
    return torch.cos(torch.arange(BATCH_SIZE * width, dtype=torch.float64)).exp().view(BATCH_SIZE, width)


def objective(mode: str, logp: Tensor, old: Tensor, advantage: float, dual: float) -> Tensor:
    """What one sequence's tokens [L] maximise, by the sign of the advantage instead of by minima of products."""
    gap = logp - old
    if mode == "gspo":  # arXiv 2507.18071: the value of the sequence's ratio, each token's own gradient
        gap = gap.mean().detach() + logp - logp.detach()
    ratio = gap.exp()
    if mode in ("vanilla", "gspo"):
        if advantage >= 0:
            return advantage * ratio.clamp(max=1 + HIGH)
        return advantage * ratio.clamp(1 - LOW, dual if mode == "vanilla" else math.inf)
    if mode == "cispo":  # arXiv 2506.13585
        return ratio.detach().clamp(1 - LOW, 1 + HIGH) * advantage * logp
    if mode == "sapo":  # arXiv 2511.20347
        tau = SAPO[0] if advantage > 0 else SAPO[1]
        return advantage * 4 / tau / (1 + torch.exp(tau * (1 - ratio)))
    bounded = gap.clamp(max=HIGH) if advantage > 0 else gap.clamp(min=-LOW)  # arXiv 2507.20673
    return advantage * bounded.mean().exp().expand(len(logp))


def divergence(kind: str, logp: Tensor, ref: Tensor) -> Tensor:
    """Schulman's estimates, from the ratio of the probabilities."""
    ratio = (ref - logp).exp()
    return {"k1": -ratio.log(), "k2": ratio.log() ** 2 / 2, "k3": ratio - 1 - ratio.log()}[kind]


def reduce(sequences: list[Tensor], settings: Settings) -> Tensor:
    """The tokens of all sequences to one number, as ``settings.aggregation`` says."""
    filled = [tokens for tokens in sequences if len(tokens)]
    count = settings.sequences or len(filled)
    if settings.aggregation.startswith("token"):
        total = sum(tokens.sum() for tokens in filled)
        return total / (settings.tokens or BATCH.tokens) if settings.aggregation == "token-mean" else total
    if settings.aggregation == "seq-mean-token-mean":
        return sum(tokens.mean() for tokens in filled) / count
    horizon = LONGEST if settings.aggregation.endswith("norm") else 1
    return sum(tokens.sum() for tokens in filled) / count / horizon


@cache
def verl(settings: Settings) -> tuple[Tensor, Any]:
    """Loss and gradients."""
    logprobs, entropies = BATCH.logprobs()
    weights = weights_of(settings.weights)
    terms: dict[str, list[Tensor]] = {"policy": [], "kl": [], "entropy": []}
    for b in range(BATCH_SIZE):
        where = BATCH.mask[b]
        logp, old, ref = (values[b][where] for values in (logprobs, BATCH.old, BATCH.ref))
        gain = objective(settings.mode, logp, old, float(BATCH.advantages[b]), settings.dual)
        terms["policy"].append(-gain if weights is None else -gain * weights[b].expand(LONGEST)[where])
        terms["kl"].append(divergence(settings.kl or "k1", logp, ref))
        terms["entropy"].append(entropies[b][where])
    loss = reduce(terms["policy"], settings)
    if settings.kl is not None:
        loss = loss + BETA * reduce(terms["kl"], settings)
    if settings.entropy:
        loss = loss - ENTROPY * reduce(terms["entropy"], settings)
    return loss.detach(), gradients(BATCH, loss)


def as_options(settings: Settings) -> dict[str, Any]:
    """The same settings in our words."""
    sequences = settings.sequences or FILLED
    reductions: dict[str, tuple[str, float | None]] = {
        "token-mean": ("token_mean", settings.tokens),
        "token-sum": ("token_mean", 1),
        "seq-mean-token-sum": ("sequence_sum", sequences),
        "seq-mean-token-sum-norm": ("sequence_sum", sequences * LONGEST),
        "seq-mean-token-mean": ("sequence_mean", sequences),
    }
    names = {"vanilla": "grpo", "geo_mean": "gmpo"}
    reduction, denominator = reductions[settings.aggregation]
    return {
        "loss": names.get(settings.mode, settings.mode),
        "reduction": reduction,
        "denominator": denominator,
        "epsilon_low": LOW,
        "epsilon_high": HIGH,
        "dual_clip": settings.dual if settings.mode == "vanilla" and settings.dual < math.inf else None,
        "sapo_temperatures": SAPO,
        "old_logprobs": BATCH.old,
        "ref_logprobs": BATCH.ref,
        "beta": 0.0 if settings.kl is None else BETA,
        "kl": settings.kl or "k1",
        "entropy_coef": ENTROPY if settings.entropy else 0.0,
        "sampler_weights": weights_of(settings.weights),
    }


def compare(cases: list[Settings], impl: str) -> None:
    failures = []
    for settings in cases:
        error = disagreement(ours(BATCH, impl=impl, **as_options(settings)), verl(settings))
        if not error <= EXACT:
            failures.append(f"{error:.1e} {settings}")
    assert not failures, "\n".join(failures)


@both
@pytest.mark.parametrize(("mode", "aggregation"), MODES)
def test_loss_and_gradients_equal_the_published_formulas(mode, aggregation, impl):
    weights = (None, "sequence") if mode in ("gspo", "geo_mean") else (None, "token", "sequence")
    count = BATCH_SIZE if mode == "geo_mean" else None
    axes = product((None, "k1", "k2", "k3"), (False, True), weights)
    compare([Settings(mode, aggregation, *rest, sequences=count) for rest in axes], impl)


@both
def test_without_dual_clip_the_loss_is_unbounded_as_published(impl):
    compare([Settings(aggregation=aggregation, dual=math.inf) for aggregation in AGGREGATIONS], impl)


@both
def test_global_numbers_of_tokens_and_sequences_are_denominators(impl):
    compare([Settings(mode, way, tokens=71, sequences=12) for mode, way in MODES], impl)


NO_HOLES = replace(BATCH, sampled=torch.ones_like(BATCH.sampled))
MISTAKES: dict[str, tuple[Settings, Batch, dict[str, Any]]] = {
    "another lower bound": (Settings(), BATCH, {"epsilon_low": 0.25}),
    "another upper bound": (Settings(), BATCH, {"epsilon_high": 0.33}),
    "no dual clip": (Settings(), BATCH, {"dual_clip": None}),
    "another dual clip": (Settings(), BATCH, {"dual_clip": DUAL + 0.2}),
    "a ratio a token in gspo": (Settings("gspo"), BATCH, {"level": "token"}),
    "a clip of the ratio instead of its logarithm": (Settings("geo_mean"), BATCH, {"loss": "gspo"}),
    "an arithmetic mean instead of a geometric one": (Settings("geo_mean"), BATCH, {"loss": "grpo"}),
    "no lower bound in cispo": (Settings("cispo"), BATCH, {"epsilon_low": 1.0}),
    "the temperatures of sapo swapped": (Settings("sapo"), BATCH, {"sapo_temperatures": (SAPO[1], SAPO[0])}),
    "k2 for k1": (Settings(kl="k1"), BATCH, {"kl": "k2"}),
    "k3 for k2": (Settings(kl="k2"), BATCH, {"kl": "k3"}),
    "a ratio on the KL": (Settings(kl="k3"), BATCH, {"kl_correction": True}),
    "no entropy bonus": (Settings(entropy=True), BATCH, {"entropy_coef": 0.0}),
    "no sampler weights": (Settings(weights="token"), BATCH, {"sampler_weights": None}),
    "empty sequences in the mean": (Settings(aggregation="seq-mean-token-mean"), BATCH, {"denominator": BATCH_SIZE}),
    "a sum over tokens for a mean": (Settings(aggregation="seq-mean-token-mean"), BATCH, {"reduction": "sequence_sum"}),
    "tools in the loss": (Settings(), NO_HOLES, {}),
}


@both
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_would_be_seen(mistake, impl):
    settings, batch, change = MISTAKES[mistake]
    assert disagreement(ours(batch, impl=impl, **as_options(settings) | change), verl(settings)) > WRONG
