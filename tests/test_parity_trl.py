"""``policy_loss`` against TRL's own ``GRPOTrainer._compute_loss``, in float64.

TRL's loss gets log-probs of plain PyTorch, so that it has gradients in hidden states and weight. They are compared to
rounding; where conventions differ the settings are converted:

* ``cispo`` clamps at ``epsilon_high`` in TRL, at ``1 + epsilon_high`` in ours, which has a lower bound (1: none) too;
* TRL divides by numbers of its own (accumulation, processes), ours by ``denominator``;
* TRL's entropy bonus is a mean over the tokens that it acts on whatever the loss divides by, ours is reduced like the
  loss: they agree, up to a factor on the coefficient, where every token has the same weight, so not under the mean over
  sequences of ``grpo`` and ``sapo``;
* TRL does not clamp log-ratios at +-20; these stay within 2;
* TRL rounds the temperatures of ``sapo`` to float32; these are the same in it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from arft_fast.kernels import policy_loss

from .packing import Batch, disagreement, gradients, make_batch, ours, pack
from .trl_loss import EXTRA, HIGH, ITEMS, LOW, PROCESSES, SAPO, STEPS, Settings, run_trl

BATCH = make_batch()
BATCH_SIZE, LONGEST = BATCH.ids.shape
EXACT = 1e-12
"""Relative; float64 has 1e-16, and a gradient sums about a hundred terms."""
WRONG = 1e-3
"""What any mistake makes of it, at the least."""

both = pytest.mark.parametrize("impl", ["reference", "native"], indirect=True)


def weights_of(level: str | None) -> Tensor | None:
    """Importance weights [B, T] or [B, 1] as a sampler correction would give them, some of them 0."""
    if level is None:
        return None
    if level == "sequence":
        return torch.tensor([[0.7], [1.3], [1.0], [0.0], [1.6], [0.9], [1.1]], dtype=torch.float64)
    wave = torch.sin(torch.arange(BATCH_SIZE * LONGEST, dtype=torch.float64)).view(BATCH_SIZE, LONGEST)
    return torch.where(wave < -0.9, 0.0, wave.exp())


@cache
def trl(settings: Settings) -> tuple[Tensor, Any, dict[str, list[float]]]:
    """Loss, gradients and metrics on the batch of this file: one run for every ``impl`` to be compared with."""
    return run_trl(settings, BATCH, weights_of(settings.weights))


def kept_tokens(batch: Batch, quantile: float) -> int:
    """How many tokens TRL's entropy mask keeps; both sides of the threshold are far enough from it for its float32."""
    entropy = batch.logprobs()[1][batch.mask].detach().sort(descending=True).values
    kept = int((entropy >= entropy.quantile(1 - quantile)).sum())
    assert kept == len(entropy) or entropy[kept - 1] - entropy[kept] > 1e-5
    return kept


def as_options(settings: Settings, batch: Batch = BATCH) -> dict[str, Any]:
    """The same settings in our words."""
    window = settings.accumulation
    denominators = {
        "bnpo": batch.tokens * window,
        "dr_grpo": BATCH_SIZE * (LONGEST + EXTRA) * window,
        **dict.fromkeys(("dapo", "cispo"), float(ITEMS) / PROCESSES * window / STEPS),
        **dict.fromkeys(("grpo", "sapo", "luspo"), BATCH_SIZE * window),
    }
    denominator = denominators[settings.loss_type]
    bonus = settings.entropy_coef * denominator / (kept_tokens(batch, settings.quantile) * window)
    return {
        "loss": "grpo" if settings.loss_type == "luspo" else settings.loss_type,
        "level": settings.level,
        "reduction": "sequence_sum" if settings.loss_type == "luspo" else None,
        "denominator": denominator,
        "epsilon_low": 1.0 if settings.loss_type == "cispo" else LOW,
        "epsilon_high": HIGH,
        "delta": settings.delta,
        "sapo_temperatures": SAPO,
        "old_logprobs": batch.old if settings.off_policy else None,
        "ref_logprobs": batch.ref,
        "beta": settings.beta,
        "kl_correction": settings.correct_kl,
        "sampler_weights": weights_of(settings.weights),
        "top_entropy_quantile": settings.quantile,
        "entropy_coef": bonus,
        "measure_all": True,
    }


def matrix(loss_type: str, level: str) -> list[Settings]:
    """All combinations of what the loss can be given."""
    kls = ((0.0, False), (0.04, False), (0.04, True))
    deltas = (None, 1.4) if loss_type not in ("cispo", "sapo") else (None,)
    bonuses = (0.0,) if loss_type in ("grpo", "sapo") else (0.0, 0.01)
    axes = product((True, False), kls, deltas, (None, "token", "sequence"), (1.0, 0.4), bonuses)
    return [
        Settings(loss_type, level, off_policy, *kl, delta, weights, quantile, bonus)
        for off_policy, kl, delta, weights, quantile, bonus in axes
    ]


@both
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo"])
def test_loss_and_gradients_equal_trls(loss_type, level, impl):
    failures = []
    for settings in matrix(loss_type, level):
        error = disagreement(ours(BATCH, impl=impl, **as_options(settings)), trl(settings))
        if not error <= EXACT:
            failures.append(f"{error:.1e} {settings}")
    assert not failures, "\n".join(failures)


DEFAULTS = {"grpo": {}, "bnpo": {}, "sapo": {}, "luspo": {"level": "sequence"}}


@both
@pytest.mark.parametrize("loss_type", DEFAULTS)
def test_the_default_denominator_is_trls_for_one_micro_batch(loss_type, impl):
    settings = Settings(loss_type, accumulation=1, **DEFAULTS[loss_type])
    options = as_options(settings) | {"denominator": None}
    assert disagreement(ours(BATCH, impl=impl, **options), trl(settings)) <= EXACT


@both
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_tokens_of_tools_may_be_left_out_of_the_rows_instead_of_masked(level, impl):
    settings = Settings("dapo", level, beta=0.04)
    options = as_options(settings)
    for name in ("old_logprobs", "ref_logprobs"):
        options[name] = options[name][BATCH.mask]
    loss, _ = policy_loss(**pack(BATCH, drop_holes=True), **options, impl=impl)
    assert disagreement((loss.detach(), gradients(BATCH, loss)), trl(settings)) <= EXACT


@both
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_an_advantage_a_token_counts_as_in_trl(level, impl):
    settings = Settings("dapo", level, beta=0.04)
    per_token = BATCH.advantages[:, None] * torch.linspace(-0.5, 1.0, LONGEST, dtype=torch.float64)
    expected = run_trl(settings, replace(BATCH, advantages=per_token), None)
    actual = ours(BATCH, impl=impl, **as_options(settings), advantages=per_token[BATCH.completion])
    assert disagreement(actual, expected) <= EXACT


def trl_ratio(mode: str, clip: tuple[float, float], anchor: Tensor) -> Tensor:
    """TRL's weight of the gap between trainer and sampler: [B, T], or [B, 1] for the modes of whole sequences."""
    level, kind = mode.split("_")
    gap = torch.where(BATCH.mask, anchor - BATCH.sampler, 0.0)
    ratio = (gap.sum(1, keepdim=True) if level == "sequence" else gap).exp()
    if kind == "truncate":
        return ratio.clamp(*clip)
    return ratio.masked_fill((ratio < clip[0]) | (ratio > clip[1]), 0.0)


@both
@pytest.mark.parametrize("clip", [(0.0, 3.0), (0.9, 1.2)])
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_the_sampler_correction_gives_trls_weights(mode, clip, impl):
    """On-policy TRL weighs by the log-probs before the update, which are the current ones, without a gradient."""
    failures = []
    for loss_type, level, off_policy, quantile in product(
        ("grpo", "dapo", "cispo", "sapo"), ("token", "sequence"), (True, False), (1.0, 0.4)
    ):
        settings = Settings(loss_type, level, off_policy, beta=0.04, weights="given", quantile=quantile)
        anchor = BATCH.old if off_policy else BATCH.logprobs()[0].detach()
        expected = run_trl(settings, BATCH, trl_ratio(mode, clip, anchor))
        options = as_options(replace(settings, weights=None))
        correction = {"sampler_logprobs": BATCH.sampler, "sampler_correction": mode, "sampler_clip": clip}
        error = disagreement(ours(BATCH, impl=impl, **options, **correction), expected)
        if not error <= EXACT:
            failures.append(f"{error:.1e} {settings}")
    assert not failures, "\n".join(failures)


@both
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "cispo"])
def test_the_statistics_equal_trls_metrics(loss_type, impl):
    """At the token level: at the level of sequences TRL counts clipped sequences, ours their tokens."""
    settings = Settings(loss_type, beta=0.04, delta=1.4 if loss_type != "cispo" else None)
    _, _, metrics = trl(settings)
    _, _, statistics = ours(BATCH, impl=impl, **as_options(settings))
    names = {"kl": "kl", "entropy": "entropy"}
    if loss_type == "cispo":
        names["cispo_clip_ratio"] = "clip_ratio/high_mean"
    else:
        names |= {name: name for name in ("clip_ratio/low_mean", "clip_ratio/high_mean")}
    for theirs, mine in names.items():
        assert float(statistics[mine]) == pytest.approx(metrics[theirs][0], rel=1e-6), theirs  # TRL divides in float32
        assert float(statistics[mine]) > 0, theirs


NO_HOLES = replace(BATCH, sampled=torch.ones_like(BATCH.sampled))
OTHER_ADVANTAGES = replace(BATCH, advantages=BATCH.advantages.roll(1))
MISTAKES = {
    "another lower bound": (Settings(), {"epsilon_low": 0.25}),
    "another upper bound": (Settings(), {"epsilon_high": 0.33}),
    "one bound for both sides": (Settings(), {"epsilon_high": None}),
    "an upper bound of cispo without the one": (Settings("cispo"), {"epsilon_high": HIGH - 0.1}),
    "a lower bound in cispo": (Settings("cispo"), {"epsilon_low": LOW}),
    "the temperatures of sapo swapped": (Settings("sapo"), {"sapo_temperatures": SAPO[::-1]}),
    "no cap of the ratio": (Settings(delta=1.4), {"delta": None}),
    "tokens instead of sequences": (Settings(level="sequence"), {"level": "token"}),
    "sequences instead of tokens": (Settings("dapo"), {"level": "sequence"}),
    "another KL estimate": (Settings(beta=0.04), {"kl": "k2"}),
    "no KL": (Settings(beta=0.04), {"beta": 0.0}),
    "the KL without its correction": (Settings(beta=0.04, correct_kl=True), {"kl_correction": False}),
    "on-policy": (Settings(), {"old_logprobs": None}),
    "no sampler weights": (Settings(weights="token"), {"sampler_weights": None}),
    "another share of tokens": (Settings(quantile=0.4), {"top_entropy_quantile": 0.6}),
    "no entropy bonus": (Settings("bnpo", entropy_coef=0.01), {"entropy_coef": 0.0}),
    "a bonus that is a mean over sequences": (Settings("grpo", entropy_coef=0.01), {}),
    "another reduction": (Settings("luspo"), {"reduction": "sequence_mean"}),
    "the denominator of this micro-batch": (Settings("dapo"), {"denominator": None}),
}


@both
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_would_be_seen(mistake, impl):
    settings, change = MISTAKES[mistake]
    assert disagreement(ours(BATCH, impl=impl, **as_options(settings) | change), trl(settings)) > WRONG


@both
@pytest.mark.parametrize("batch", [NO_HOLES, OTHER_ADVANTAGES], ids=["tools in the loss", "advantages of others"])
def test_a_mistake_in_the_batch_would_be_seen(batch, impl):
    settings = Settings()
    assert disagreement(ours(batch, impl=impl, **as_options(settings)), trl(settings)) > WRONG


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_batch_reaches_every_branch(level):
    ratio = BATCH.logprobs()[0].detach() - BATCH.old
    if level == "sequence":
        ratio = torch.where(BATCH.mask, ratio, 0.0).sum(1, keepdim=True) / BATCH.mask.sum(1, keepdim=True)
    ratio = ratio.exp().expand(BATCH.mask.shape)[BATCH.mask]
    advantage = BATCH.advantages[:, None].expand(BATCH.mask.shape)[BATCH.mask]
    inside = (ratio > 1 - LOW) & (ratio < 1 + HIGH)
    branches = {
        "gains inside": (advantage > 0) & inside,
        "gains clipped": (advantage > 0) & (ratio > 1 + HIGH),
        "loses inside": (advantage < 0) & inside,
        "loses clipped": (advantage < 0) & (ratio < 1 - LOW),
        "loses capped": (advantage < 0) & (ratio > 1.4),
    }
    assert all(bool(rows.any()) for rows in branches.values()), {name: int(r.sum()) for name, r in branches.items()}
