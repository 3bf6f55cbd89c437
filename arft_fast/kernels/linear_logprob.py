"""Log-probs of sampled tokens from hidden states. Dimension letters: N rows, D hidden, V vocabulary."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from . import checks, reference

Impl = Literal["auto", "reference"]


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_bytes: int = reference.CHUNK_BYTES,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """``logp[i, token_ids[i]]`` with ``logp = log_softmax((hidden @ weight.T + bias) / temperature)``, and the entropy.

    ``entropy[i] = -sum_v exp(logp[i, v]) * logp[i, v]`` in nats, of the distribution that was sampled from (bias and
    temperature included). Differentiable in ``hidden``, ``weight`` and ``bias``, both outputs, so any loss can follow.

    The logits [N, V] are never materialised: rows go through in chunks, and a chunk is computed again in the backward
    pass when there is more than one. Products and sums run in float32 (float64 if an operand is), whatever autocast
    says; gradients of all chunks meet in that dtype before they are rounded to that of ``weight``.

    Args:
        hidden: [N, D] floating, the rows that predict ``token_ids`` (already shifted by the caller).
        weight: [V, D] floating, as ``lm_head.weight``.
        token_ids: [N] int64 or int32 in 0 .. V - 1.
        bias: [V] added to the logits; -inf forbids an id. Give the sampler the same one and the two agree. Forbidden
            ids count 0 in entropy and gradient; a forbidden ``token_ids[i]`` has log-prob -inf.
        temperature: the sampler's, > 0.
        chunk_bytes: budget of one chunk of logits; one row at least.
        impl: ``"reference"`` is the one implementation of this version, ``"auto"`` chooses it.

    Returns:
        logprobs [N], entropy [N]: float64 if ``hidden`` or ``weight`` is, else float32.

    Raises:
        TypeError: a dtype or type is wrong.
        ValueError: a shape, device or value is wrong. Values of tensors are read on a CPU only; on CUDA an id out of
            range is a device-side assert.
    """
    arguments = checks.Arguments()
    checks.head(arguments, hidden, weight, token_ids, bias)
    checks.number("temperature", temperature)
    checks.positive_int("chunk_bytes", chunk_bytes)
    checks.choice("impl", impl, ("auto", "reference"))
    return reference.linear_logprob(hidden, weight, token_ids, bias, float(temperature), chunk_bytes)
