"""What a row kernel computes, and the settings that it takes: the contract between ``head.py`` and the back ends.

A row kernel reads a chunk of raw products ``x = hidden @ weight.T`` [C, V] once and leaves the gradient of the loss
with respect to ``x`` in its place. Triton (``triton_rows``) and the native library (``native_rows``) both offer

``score(logits, token_ids, bias, transform, logprobs, entropy)``
    only writes ``logprobs`` [C] and ``entropy`` [C];
``policy(logits, token_ids, bias, transform, objective, vectors, logprobs, entropy, coefficient, gradient)``
    also decides each row's coefficient ``g = d loss / d logp`` and writes ``coefficient`` [C] and ``gradient`` [C, V];
``gradients(logits, token_ids, bias, transform, coefficient, entropy_weight, gradient)``
    takes the coefficients as given, writes ``gradient``.

With ``y = transform(x + bias)``, ``logp = log_softmax(y)``, ``p = exp(logp)``, token ``t``, ``H = -sum_j p_j logp_j``,
``g`` and ``e = d loss / d H`` (``entropy_weight``; in ``policy`` it is ``-entropy_coef * scale``; None means 0)::

    gradient_j = (g (1[j = t] - p_j) - e p_j (logp_j + H)) dy_j/dx_j

A forbidden id (bias -inf) counts 0 everywhere; as the token itself it has logp -inf. A row with g = 0 and e = 0
gets a gradient of zeros (NaN and infinite logits included). ``gradient`` may be ``logits`` itself, or a narrower dtype
laid over the same memory with the same row starts. An id outside 0 .. V - 1 is never read: on a CPU the call is
refused, Triton answers NaN, the CUDA library traps. Statistics run in float32 (float64 for
float64 logits); ``1 - p_t`` is summed from the other ids, so that it keeps its digits when ``p_t`` is near 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

Surrogate = Literal["clip", "cispo", "sapo"]
Kl = Literal["k1", "k2", "k3"]
SamplerCorrection = Literal["none", "truncate", "mask"]

SURROGATES: tuple[Surrogate, ...] = ("clip", "cispo", "sapo")
KLS: tuple[Kl, ...] = ("k1", "k2", "k3")
SAMPLER_CORRECTIONS: tuple[SamplerCorrection, ...] = ("none", "truncate", "mask")

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-this before ``exp``: e^20 is finite in float32, and no honest ratio comes near it."""


class Transform(NamedTuple):
    """From a raw product to a logit: ``y = softcap tanh(logit_scale x / softcap) / temperature``; -inf stays -inf."""

    temperature: float = 1.0
    softcap: float = 0.0
    """0: no cap, ``y = logit_scale x / temperature``."""
    logit_scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class RowObjective:
    """The part of an objective that a single row decides: its coefficient ``g`` from logp, old, ref and sampler.

    ::

        l = logp - old (0 without ``old``), rho = exp(clamp(l, +-MAX_LOG_RATIO)), A the advantage
        w = 1, or with ``sampler``: v = exp(clamp(logp - sampler, +-MAX_LOG_RATIO));
            "truncate": min(max(v, sampler_low), sampler_high), "mask": v if sampler_low <= v <= sampler_high else 0
        d surrogate / d logp (of what is maximised):
          clip:  c1 = min(rho, delta), c2 = min(max(rho, ratio_low), ratio_high); the smaller of c1 A and c2 A counts
                 (c1 A if equal); A rho if that one is not at its bound and |l| <= MAX_LOG_RATIO, else 0;
                 also 0 if A < 0 and it is below dual_clip A
          cispo: A min(max(rho, ratio_low), ratio_high)
          sapo:  4 s (1 - s) rho A, s = sigmoid(tau (rho - 1)), tau = sapo_positive if A > 0 else sapo_negative;
                 0 if |l| > MAX_LOG_RATIO
        d KL / d logp, with d = ref - logp:
          k1: value -d, slope 1;  k2: d^2 / 2, slope -d
          k3: with d clamped to +-MAX_LOG_RATIO: e^d - d - 1, slope 1 - e^d (0 where clamped)
          ``kl_correction`` multiplies the estimate by rho: slope becomes rho (slope + value) (no + value if |l| is past
          MAX_LOG_RATIO)
        g = scale (beta KL' - w surrogate')

    The weight ``w`` is a constant: no gradient flows through it. KL terms exist where ``ref`` is given and beta > 0.
    """

    surrogate: Surrogate = "clip"
    ratio_low: float = 0.8
    ratio_high: float = 1.2
    delta: float = math.inf
    dual_clip: float = math.inf
    sapo_positive: float = 1.0
    sapo_negative: float = 1.05
    kl: Kl = "k3"
    beta: float = 0.0
    kl_correction: bool = False
    entropy_coef: float = 0.0
    sampler: SamplerCorrection = "none"
    sampler_low: float = 0.0
    sampler_high: float = math.inf


class Vectors(NamedTuple):
    """Per-row inputs [C] of ``policy``, in the dtype of the statistics."""

    advantage: Tensor
    scale: Tensor
    """The row's weight in the loss, from mask and reduction; 0: it takes no part."""
    old: Tensor | None = None
    ref: Tensor | None = None
    sampler: Tensor | None = None
    """Needed when the objective corrects for the sampler."""

    def take(self, index: slice | Tensor) -> Vectors:
        """The vectors of some rows."""
        old, ref, sampler = (None if values is None else values[index] for values in self[2:])
        return Vectors(self.advantage[index], self.scale[index], old, ref, sampler)
