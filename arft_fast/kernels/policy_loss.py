"""The policy-gradient loss of GRPO and DAPO. Dimension letters: N rows, D hidden, V vocabulary, B sequences."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from . import checks, reference
from .reference import Reduction

Impl = Literal["auto", "reference"]


def policy_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    *,
    cu_seqlens: Tensor,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    epsilon_low: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    reduction: Reduction = "grpo",
    denominator: float | None = None,
    chunk_bytes: int = reference.CHUNK_BYTES,
    impl: Impl = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """``loss_t = -min(r_t A, clip(r_t, 1 - epsilon_low, 1 + epsilon_high) A) + beta (exp(d_t) - d_t - 1)``, reduced.

    With ``logp`` of ``linear_logprob``, ``r_t = exp(logp_t - old_t)`` and ``d_t = ref_t - logp_t``: GRPO's objective
    (arXiv 2402.03300, equation 3) with its unbiased k3 estimate of the KL (equation 4). ``reduction``:

    * ``"grpo"``: ``sum_b mean_{t in b} loss_t / denominator``;
    * ``"dapo"``: ``sum_t loss_t / denominator``, every token alike (arXiv 2503.14476, equation 12).

    The logits are never materialised, see ``linear_logprob``. Log-ratios ``logp - old`` and ``ref - logp`` are clamped
    to +-20 before ``exp``, so that nothing overflows; a token beyond that gets no gradient from the clamped term.

    Args:
        hidden: [N, D] floating, rows of all sequences one after the other, only those whose token the policy sampled.
        weight: [V, D] floating.
        token_ids: [N] int64 or int32.
        advantages: [B] floating, one a sequence.
        cu_seqlens: [B + 1] int64 or int32: sequence b holds the rows ``cu_seqlens[b] .. cu_seqlens[b + 1] - 1``. It may
            hold none; it then adds nothing but counts in the default denominator.
        old_logprobs: [N] of the policy that sampled; None: on-policy, ``r_t`` is 1 with the gradient of ``logp_t``.
        ref_logprobs: [N] of the reference policy; needed when ``beta`` > 0.
        sampler_logprobs: [N] as the engine reported them; measured only (``sampler_gap``), never in the loss.
        bias, temperature, chunk_bytes: as in ``linear_logprob``.
        epsilon_low, epsilon_high: the clip range; ``epsilon_high`` None: the same as ``epsilon_low``.
        beta: weight of the KL.
        denominator: None: B (``"grpo"``) or N (``"dapo"``). Under data parallelism or gradient accumulation pass the
            global number of sequences or tokens: the sum of the parts' losses is then the whole's.
        impl: ``"reference"`` is the one implementation of this version, ``"auto"`` chooses it.

    Returns:
        The loss, 0-dim, zero but connected to the graph when N is 0; and detached 0-dim means over the N tokens:
        ``entropy``, ``kl`` (0 without ``ref_logprobs``), ``clip_ratio/low_mean``, ``clip_ratio/high_mean`` (share of
        tokens whose gradient the clip removes), ``sampler_gap`` (``|logp - sampler|``, 0 without), with ``ratio_max``
        and ``tokens`` (N, the weight of these means).

    Raises:
        TypeError: a dtype or type is wrong.
        ValueError: a shape, device or value is wrong, or ``beta`` > 0 without ``ref_logprobs``. Values of tensors are
            read on a CPU only; elsewhere a NaN, or a token that ``bias`` forbids, ends in a NaN loss.
    """
    arguments = checks.Arguments()
    checks.head(arguments, hidden, weight, token_ids, bias)
    arguments.offsets("cu_seqlens", cu_seqlens, "B", "N")
    arguments.tensor("advantages", advantages, "B", "floating")
    checks.finite("advantages", advantages, "masked trajectories have advantage 0 (see group_advantage)")
    for name, logprobs in (
        ("old_logprobs", old_logprobs),
        ("ref_logprobs", ref_logprobs),
        ("sampler_logprobs", sampler_logprobs),
    ):
        if logprobs is not None:
            arguments.tensor(name, logprobs, "N", "floating")
            checks.finite(name, logprobs, "score it with the bias and temperature of the sampler")
    if bias is not None and checks.on_host(bias) and not bool(bias[token_ids].isfinite().all()):
        raise ValueError("token_ids: holds an id that bias forbids; sample with the same bias")
    checks.number("temperature", temperature)
    checks.number("epsilon_low", epsilon_low)
    epsilon_high = epsilon_low if epsilon_high is None else epsilon_high
    checks.number("epsilon_high", epsilon_high)
    checks.number("beta", beta, zero=True)
    if beta > 0 and ref_logprobs is None:
        raise ValueError(
            "ref_logprobs: needed when beta > 0; score the tokens with the reference policy (linear_logprob under "
            "torch.no_grad()), or pass beta=0"
        )
    checks.choice("reduction", reduction, ("grpo", "dapo"))
    if denominator is None:
        denominator = max(1, advantages.shape[0] if reduction == "grpo" else hidden.shape[0])
    checks.number("denominator", denominator)
    checks.positive_int("chunk_bytes", chunk_bytes)
    checks.choice("impl", impl, ("auto", "reference"))
    return reference.policy_loss(
        hidden,
        weight,
        token_ids,
        advantages,
        cu_seqlens,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        sampler_logprobs=sampler_logprobs,
        bias=bias,
        temperature=float(temperature),
        epsilon_low=float(epsilon_low),
        epsilon_high=float(epsilon_high),
        beta=float(beta),
        reduction=reduction,
        denominator=float(denominator),
        chunk_bytes=chunk_bytes,
    )
