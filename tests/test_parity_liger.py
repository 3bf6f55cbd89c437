"""``policy_loss`` against Liger's ``LigerFusedLinearGRPOLoss``, the published fused head with a GRPO loss.

Liger's log-probs are float32 whatever its operands are. So its formulas (``ppo_loss_fn``, a function of log-probs) are
compared in float64 to rounding, and the whole of it, chunks and gradients included, in float32. Its conventions:

* ``cispo`` clamps at ``epsilon_high``, ours at ``1 + epsilon_high``;
* ``cispo`` and ``sapo`` exist at the token level only;
* ``luspo`` is compared at the sequence level without KL and token weights: with them Liger's sum runs over padding too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction
from torch import Tensor

from arft_fast.kernels import linear_logprob

from .packing import Batch, disagreement, gradients, graph, make_batch, ours

BATCH = make_batch()
SINGLE = BATCH.to(torch.float32)
BATCH_SIZE, LONGEST = BATCH.ids.shape
LOW, HIGH, SAPO = 0.2, 0.28, (0.75, 1.25)
CAP = LONGEST + 3
EXACT = 1e-12
ROUNDED = 2e-5
"""Relative, between two float32 results: log-probs down to -12 have an error of 1e-6 in each, and tokens of both signs
cancel to a tenth in the loss."""
WRONG = 1e-3
"""What any mistake makes of it, at the least."""

both = pytest.mark.parametrize("impl", ["reference", "native"], indirect=True)


@dataclass(frozen=True)
class Settings:
    """A row of the test matrix, in Liger's words."""

    loss_type: str = "grpo"
    level: str = "token"
    off_policy: bool = True
    beta: float = 0.0
    correct_kl: bool = False
    delta: float | None = None
    weights: str | None = None
    """Level of the sampler's importance weights."""
    items: float | None = None
    """Tokens of the whole generation batch; None: of this one."""

    def to_liger(self) -> dict[str, Any]:
        """The settings that both forms of Liger's loss take."""
        return {
            "loss_type": self.loss_type,
            "importance_sampling_level": self.level,
            "beta": self.beta,
            "use_bias_correction_kl": self.correct_kl,
            "delta": self.delta,
            "epsilon_low": LOW,
            "epsilon_high": 1 + HIGH if self.loss_type == "cispo" else HIGH,
            "sapo_temperature_pos": SAPO[0],
            "sapo_temperature_neg": SAPO[1],
            "max_completion_length": CAP,
        }


def weights_of(level: str | None, dtype: torch.dtype) -> Tensor | None:
    """Importance weights [B, T] or [B, 1], some of them 0."""
    if level is None:
        return None
    width = LONGEST if level == "token" else 1
    wave = torch.sin(torch.arange(1, BATCH_SIZE * width + 1, dtype=dtype)).view(BATCH_SIZE, width)
    return torch.where(wave < -0.9, 0.0, wave.exp())


def as_options(settings: Settings, batch: Batch) -> dict[str, Any]:
    """The same settings in our words."""
    luspo, cispo = settings.loss_type == "luspo", settings.loss_type == "cispo"
    denominators = {"dr_grpo": float(BATCH_SIZE * CAP), "dapo": settings.items, "cispo": settings.items}
    return {
        "loss": "grpo" if luspo else settings.loss_type,
        "reduction": "sequence_sum" if luspo else None,
        "denominator": denominators.get(settings.loss_type),
        "level": settings.level,
        "epsilon_low": 1.0 if cispo else LOW,
        "epsilon_high": HIGH,
        "delta": settings.delta,
        "sapo_temperatures": SAPO,
        "old_logprobs": batch.old if settings.off_policy else None,
        "ref_logprobs": batch.ref,
        "beta": settings.beta,
        "kl_correction": settings.correct_kl,
        "sampler_weights": weights_of(settings.weights, batch.old.dtype),
    }


@cache
def formula(settings: Settings) -> tuple[Tensor, Any]:
    """Liger's loss from float64 log-probs, with gradients in hidden states and weight."""
    mask = BATCH.mask.double()
    loss, _ = LigerFusedLinearGRPOFunction.ppo_loss_fn(
        per_token_logps=BATCH.logprobs()[0],
        attention_mask=mask,
        full_attention_mask=mask,
        advantages=BATCH.advantages,
        ref_per_token_logps=BATCH.ref,
        old_per_token_logps=BATCH.old if settings.off_policy else None,
        vllm_is_ratio=weights_of(settings.weights, torch.float64),
        num_items_in_batch=settings.items,
        **settings.to_liger(),
    )
    return loss.detach(), gradients(BATCH, loss)


def fused(settings: Settings, batch: Batch, *, temperature: float = 1.0, chunk_size: int = 1, **inputs: Any) -> Any:
    """Liger's fused loss and gradients on CPU tensors, uncompiled."""
    module = LigerFusedLinearGRPOLoss(
        **settings.to_liger(),
        temperature=temperature,
        chunk_size=chunk_size,
        use_ref_model=settings.beta > 0,
        compiled=False,
    )
    inputs = {"ref_per_token_logps": batch.ref if settings.beta > 0 else None} | inputs
    loss, _ = module(
        batch.hidden,
        batch.weight,
        batch.ids,
        batch.mask.long(),
        batch.advantages,
        old_per_token_logps=batch.old if settings.off_policy else None,
        vllm_is_ratio=weights_of(settings.weights, batch.old.dtype),
        num_items_in_batch=settings.items,
        **inputs,
    )
    operands = (batch.hidden, batch.weight, *([inputs["bias"]] if "bias" in inputs else []))
    return loss.detach(), torch.autograd.grad(loss, operands)


@cache
def fused_single(settings: Settings) -> Any:
    """The same on the float32 batch, once for every ``impl``."""
    return fused(settings, SINGLE)


def matrix(loss_type: str, level: str) -> list[Settings]:
    """All combinations of what Liger's loss can be given."""
    kls = ((0.0, False), (0.04, False), (0.04, True))
    weights: tuple[str | None, ...] = (None, "token", "sequence")
    deltas = (None,) if loss_type in ("cispo", "sapo") else (None, 1.4)
    items = (None, 37.0) if loss_type in ("cispo", "dapo") else (None,)
    if loss_type == "luspo":
        kls, weights = kls[:1], (None, "sequence")
    return [
        Settings(loss_type, level, off_policy, *kl, delta, weight, count)
        for off_policy, kl, delta, weight, count in product((True, False), kls, deltas, weights, items)
    ]


LOSSES = [
    *((loss_type, "token") for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")),
    *((loss_type, "sequence") for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")),
]


@both
@pytest.mark.parametrize(("loss_type", "level"), LOSSES)
def test_loss_and_gradients_equal_ligers_formulas(loss_type, level, impl):
    failures = []
    for settings in matrix(loss_type, level):
        error = disagreement(ours(BATCH, impl=impl, **as_options(settings, BATCH)), formula(settings))
        if not error <= EXACT:
            failures.append(f"{error:.1e} {settings}")
    assert not failures, "\n".join(failures)


@both
@pytest.mark.parametrize(("loss_type", "level"), LOSSES)
def test_loss_and_gradients_equal_ligers_fused_ones(loss_type, level, impl):
    failures = []
    for settings in matrix(loss_type, level):
        error = disagreement(ours(SINGLE, impl=impl, **as_options(settings, SINGLE)), fused_single(settings))
        if not error <= ROUNDED:
            failures.append(f"{error:.1e} {settings}")
    assert not failures, "\n".join(failures)


@both
@pytest.mark.parametrize("chunk_size", [1, 3])
def test_bias_and_temperature_count_as_in_liger(chunk_size, impl):
    settings = Settings("dapo", beta=0.04)
    bias = torch.linspace(-1.0, 1.0, len(SINGLE.weight)).requires_grad_()
    expected = fused(settings, SINGLE, temperature=0.8, chunk_size=chunk_size, bias=bias)
    loss, _ = graph(SINGLE, impl=impl, bias=bias, temperature=0.8, **as_options(settings, SINGLE))
    actual = loss.detach(), torch.autograd.grad(loss, (SINGLE.hidden, SINGLE.weight, bias))
    assert disagreement(actual, expected) <= ROUNDED


@both
def test_the_reference_policy_may_be_scored_by_either_side(impl):
    """Liger takes the reference policy's hidden states and head; ours its log-probs, from ``linear_logprob``."""
    settings = Settings("grpo", beta=0.04)
    other = make_batch(seed=1).to(torch.float32)
    ref = {"ref_input": other.hidden.detach(), "ref_weight": other.weight.detach()}
    expected = fused(settings, SINGLE, ref_per_token_logps=None, **ref)
    scored, _ = linear_logprob(ref["ref_input"].flatten(0, 1), ref["ref_weight"], SINGLE.ids.flatten(), impl=impl)
    options = as_options(settings, SINGLE) | {"ref_logprobs": scored.view_as(SINGLE.old)}
    assert disagreement(ours(SINGLE, impl=impl, **options), expected) <= ROUNDED


def test_float64_operands_gain_nothing_in_liger(impl):
    """Why the whole of it is compared in float32: its log-probs are."""
    settings = Settings("grpo")
    exact = ours(SINGLE.to(torch.float64), impl=impl, **as_options(settings, SINGLE.to(torch.float64)))
    error = disagreement(fused(settings, SINGLE.to(torch.float64)), exact)
    assert 1e-9 < error <= ROUNDED


NO_HOLES = replace(SINGLE, sampled=torch.ones_like(SINGLE.sampled))
MISTAKES = {
    "another lower bound": (Settings(), SINGLE, {"epsilon_low": 0.25}),
    "another upper bound": (Settings(), SINGLE, {"epsilon_high": 0.33}),
    "an upper bound of cispo without the one": (Settings("cispo"), SINGLE, {"epsilon_high": HIGH - 0.1}),
    "the temperatures of sapo swapped": (Settings("sapo"), SINGLE, {"sapo_temperatures": SAPO[::-1]}),
    "no cap of the ratio": (Settings(delta=1.4), SINGLE, {"delta": None}),
    "tokens instead of sequences": (Settings(level="sequence"), SINGLE, {"level": "token"}),
    "another KL estimate": (Settings(beta=0.04), SINGLE, {"kl": "k1"}),
    "the KL without its correction": (Settings(beta=0.04, correct_kl=True), SINGLE, {"kl_correction": False}),
    "on-policy": (Settings(), SINGLE, {"old_logprobs": None}),
    "no sampler weights": (Settings(weights="token"), SINGLE, {"sampler_weights": None}),
    "a mean over sequences": (Settings("bnpo"), SINGLE, {"reduction": "sequence_mean"}),
    "the tokens of this batch": (Settings("dapo", items=37.0), SINGLE, {"denominator": None}),
    "another temperature": (Settings(), SINGLE, {"temperature": 1.1}),
    "tools in the loss": (Settings(), NO_HOLES, {}),
}


@both
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_would_be_seen(mistake, impl):
    settings, batch, change = MISTAKES[mistake]
    actual = ours(batch, impl=impl, **as_options(settings, batch) | change)
    assert disagreement(actual, fused_single(settings)) > WRONG
