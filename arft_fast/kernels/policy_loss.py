"""The policy-gradient losses of the GRPO family.

Dimension letters: N tokens, M rows of the head, D hidden, V vocabulary, B sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, reference
from .arguments import Correction, resolve_objective, resolve_rows
from .dispatch import Chosen, Impl, head_impl
from .head import default_chunk_bytes
from .linear_logprob import fused_logprob
from .objective import (
    Level,
    Loss,
    Objective,
    Reduction,
    Rows,
    known_without_gradient,
    policy_terms,
    row_problem,
    statistics,
    weighted_sum,
)
from .policy_op import fused_policy_loss
from .rows import Kl, Transform
from .shared_rows import read, read_by, stand_for_terms


def policy_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    *,
    row_index: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    sampler_weights: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    loss: Loss = "grpo",
    level: Level | None = None,
    reduction: Reduction | None = None,
    denominator: float | Tensor | None = None,
    epsilon_low: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    dual_clip: float | None = None,
    sapo_temperatures: tuple[float, float] = (1.0, 1.05),
    beta: float = 0.0,
    kl: Kl = "k3",
    kl_correction: bool = False,
    entropy_coef: float = 0.0,
    top_entropy_quantile: float = 1.0,
    sampler_correction: Correction = "none",
    sampler_clip: tuple[float, float] = (0.0, 3.0),
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    measure_all: bool = False,
    chunk_bytes: int | None = None,
    stash_bytes: int | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of GRPO and its family straight from hidden states, with its gradient taken in the forward pass.

    With ``logp`` of ``linear_logprob``, ``r = exp(logp - old)`` (at the sequence level: of the mean over the sequence)
    and A the advantage, a token contributes

    * ``grpo`` (arXiv 2402.03300), ``bnpo``, ``dr_grpo`` (2503.20783), ``dapo`` (2503.14476), ``gspo`` (2507.18071):
      ``-min(min(r, delta) A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A)``, at least ``dual_clip A`` where A < 0;
    * ``cispo`` (2506.13585): ``-clip(r, ...) A logp``, the clipped ratio a constant (its authors clip above only: pass
      ``epsilon_low`` >= 1);
    * ``sapo`` (2511.20347): ``-(4 / tau) sigmoid(tau (r - 1)) A``, tau by the sign of A;
    * ``gmpo`` (2507.20673): ``-A exp(mean over the sequence of the clipped log r)``, the clip range in log space;

    times its importance weight, ``+ beta KL(policy || ref) - entropy_coef entropy``. Reductions: ``sequence_mean`` sums
    the means of the sequences, ``sequence_sum`` and ``token_mean`` sum all tokens; all divide by ``denominator``.

    The logits are never materialised. One row kernel turns a chunk of products into gradients in place, and rows
    without a gradient (masked, advantage 0 without KL or entropy term, clipped) are left out of the two gradient
    products: with a share f of live rows the cost is 1 + 2 f products of 2 N V D operations, 3 f where the dead rows
    are known beforehand; 2 with a frozen head, 1 without gradients. Where the tokens of a sequence depend on each other
    (``gspo`` and ``gmpo`` with ``old_logprobs``, ``top_entropy_quantile``, a sequence-level sampler correction without
    ``old_logprobs``) the gradient waits for all log-probs: see ``linear_logprob`` for its cost. Statistics and sums are
    float32 as there. The result is deterministic.

    On a prefix tree several sequences share a row (the same past, the same sampled token). With ``row_index`` the head
    computes each row once, and the result is that of ``hidden[row_index]``, ``token_ids[row_index]`` and
    ``ref_logprobs[row_index]``: every token keeps its own advantage, weight and clip. On-policy without a sampler
    correction the gradients of a row's tokens add up before the product, and tokens that cancel to exactly 0 cost
    nothing (no KL or entropy term). Otherwise the gradient waits for all log-probs as above if some row has several
    tokens with a gradient (under ``torch.compile``, where values cannot choose the route, in any case).

    Args:
        hidden: [N, D] floating, rows of all sequences one after the other, only those whose token the policy sampled;
            with ``row_index`` [M, D], in any order.
        weight: [V, D] floating, as ``lm_head.weight``; whole, not sharded.
        token_ids: [N] int64 or int32; with ``row_index`` [M].
        advantages: [B] floating, one a sequence, or [N], one a token (read as [B] where B = N).
        row_index: [N] int64 or int32 in 0 .. M - 1, the row that each token reads; a row that none reads is skipped and
            has a gradient of 0. None: token i reads row i.
        cu_seqlens: [B + 1] int64 or int32: sequence b holds the tokens ``cu_seqlens[b] .. cu_seqlens[b + 1] - 1``,
            maybe none; it counts in the default denominator all the same. None: advantages are [N], and the loss one
            of single tokens with ``reduction="token_mean"``.
        old_logprobs: [N] of the policy that sampled; None: on-policy, r is 1 with the gradient of ``logp``.
        ref_logprobs: [N] of the reference policy; needed when ``beta`` > 0. With ``row_index`` [M]: it is the row's.
        sampler_logprobs: [N] as the engine reported them; for ``sampler_gap``, and for ``sampler_correction``.
        sampler_weights: [N] importance weights >= 0 of your own, constants.
        mask: [N] bool; False takes the token out of loss, lengths, default denominator and statistics.
        bias, temperature, softcap, logit_scale, chunk_bytes, stash_bytes: as in ``linear_logprob``.
        loss: a name above; it also sets ``level`` and ``reduction`` unless they are given.
        level: of the ratio, ``"token"`` or ``"sequence"``.
        denominator: > 0. None: B for the sequence reductions, the unmasked tokens for ``token_mean``. Under data
            parallelism or gradient accumulation pass the global number: the parts' losses then sum to the whole's.
            ``dr_grpo`` has no default: pass B x the longest completion allowed.
        epsilon_low, epsilon_high: the clip range; ``epsilon_high`` None: the same as ``epsilon_low``.
        delta: cap of the unclipped ratio (two-sided clipping, arXiv 2505.07291); None: no cap.
        dual_clip: > 1, the bound for negative advantages (arXiv 1912.09729); None: none.
        sapo_temperatures: tau for A > 0 and for A <= 0.
        beta: weight of the KL, estimated by ``kl`` (k1, k2, k3); ``kl_correction`` multiplies the estimate by the ratio
            (arXiv 2512.02556), which makes its gradient unbiased.
        entropy_coef: weight of the entropy bonus, reduced like the loss.
        top_entropy_quantile: share of tokens, those of highest entropy in this call, that the surrogate and the
            entropy bonus act on (arXiv 2506.01939); 1: all.
        sampler_correction: ``"token_truncate"``, ``"token_mask"``, ``"sequence_truncate"`` or ``"sequence_mask"``:
            weigh the surrogate by ``exp(old - sampler)`` (current log-probs without ``old``), of the token or summed
            over the sequence, bounded to ``sampler_clip`` or zeroed outside it.
        measure_all: score rows without a gradient too (one product each), so that statistics cover every unmasked
            token.
        impl: ``"triton"``, ``"native"``, ``"reference"`` (plain PyTorch, autograd) or ``"auto"``; see ``head_impl``.

    Returns:
        The loss, 0-dim, zero but connected to the graph when N is 0; and detached 0-dim means over the tokens that were
        computed: ``entropy``, ``kl`` (0 without ``ref_logprobs``), ``clip_ratio/low_mean``, ``clip_ratio/high_mean``
        (share of tokens outside the range on the side that the clip stops), ``sampler_gap`` (``|logp - sampler|``, 0
        without), with ``ratio_max``, ``tokens`` (how many) and ``gradient_rows`` (rows in the gradient products).

    Raises:
        TypeError: a dtype or type is wrong.
        ValueError: a shape, device or value is wrong, or an argument that another one needs is missing. Values of
            tensors are read on a CPU only and not under ``torch.compile``; elsewhere a NaN ends in a NaN loss.
        RuntimeError: ``impl`` is not available here.
    """
    arguments = checks.Arguments()
    checks.head(arguments, hidden, weight, token_ids, bias, rows="N" if row_index is None else "M")
    row_index = checks.row_numbers(arguments, row_index)
    transform = checks.transform(temperature, softcap, logit_scale)
    chunk_bytes, stash_bytes = checks.budgets(chunk_bytes, stash_bytes, default_chunk_bytes(hidden))
    chosen = head_impl(hidden, impl)
    objective, reduction = resolve_objective(
        loss=loss, level=level, reduction=reduction, epsilon_low=epsilon_low, epsilon_high=epsilon_high, delta=delta,
        dual_clip=dual_clip, sapo_temperatures=sapo_temperatures, beta=beta, kl=kl, kl_correction=kl_correction,
        entropy_coef=entropy_coef, top_entropy_quantile=top_entropy_quantile, sampler_correction=sampler_correction,
        sampler_clip=sampler_clip, has_ref=ref_logprobs is not None, has_sampler=sampler_logprobs is not None,
        has_sequences=cu_seqlens is not None, has_denominator=denominator is not None,
    )  # fmt: skip
    rows = resolve_rows(
        arguments, reference.compute_dtype(hidden, weight), reduction, denominator, advantages,
        row_index=row_index, cu_seqlens=cu_seqlens, mask=mask, old=old_logprobs, ref=ref_logprobs,
        sampler=sampler_logprobs, weight=sampler_weights,
    )  # fmt: skip
    checks.allowed(token_ids, bias)
    operands = (hidden, weight, token_ids, bias, transform)
    terms = ~known_without_gradient(rows, objective)
    live = read_by(terms, row_index, hidden.shape[0])
    if chosen == "reference":
        total, logprobs, entropy = reference.policy_loss(*operands, rows, objective, chunk_bytes, row_index)
        computed, coefficient = rows.scale != 0, live.to(logprobs.dtype)
    elif (problem := row_problem(rows, objective)) and stand_for_terms(problem[1], row_index, terms, hidden.shape[0]):
        total, logprobs, entropy, coefficient, computed = fused_policy_loss(
            *operands, rows, objective, measure_all, chunk_bytes, chosen, row_index
        )
    else:
        computed = rows.scale != 0 if measure_all else terms
        total, logprobs, entropy = _coupled(
            operands, rows, objective, row_index, computed, (chunk_bytes, stash_bytes, chosen)
        )
        coefficient = live.to(logprobs.dtype)
    return total, statistics(logprobs.detach(), entropy.detach(), coefficient, computed, rows, objective)


def _coupled(
    operands: tuple[Tensor, Tensor, Tensor, Tensor | None, Transform],
    rows: Rows,
    objective: Objective,
    row_index: Tensor | None,
    computed: Tensor,
    settings: tuple[int, int, Chosen],
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs first, then the objective on vectors: autograd carries its coefficients into the second pass.

    Returns:
        loss 0-dim, logprobs [N], entropy [N]; the latter are 0 in tokens that are not ``computed``.
    """
    hidden, weight, token_ids, bias, transform = operands
    if torch.compiler.is_compiling():  # how many rows there are must not depend on their values
        every = fused_logprob(hidden, weight, token_ids, bias, transform, *settings)
    else:
        index = read_by(computed, row_index, len(hidden)).nonzero()[:, 0]
        some = fused_logprob(hidden[index], weight, token_ids[index], bias, transform, *settings)
        blank = rows.scale.new_zeros(len(hidden))
        every = blank.index_copy(0, index, some[0]), blank.index_copy(0, index, some[1])
    logprobs, entropy = (read(values, row_index, computed) for values in every)
    return weighted_sum(policy_terms(logprobs, entropy, rows, objective).loss, rows), logprobs, entropy
