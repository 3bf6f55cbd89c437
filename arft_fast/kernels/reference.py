"""The definitions of the kernels in plain PyTorch: what correct means, in any floating dtype, on any device.

Nothing is checked here; call the public functions of the same names with ``impl="reference"``.

Dimension letters: N rows (tokens that the policy sampled), D hidden, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from .group_advantage_reference import group_advantage
from .objective import Objective, Rows, policy_terms, weighted_sum
from .rows import Transform
from .shared_rows import read, read_by

__all__ = ["CHUNK_BYTES", "compute_dtype", "group_advantage", "linear_logprob", "logits_logprob", "policy_loss"]

CHUNK_BYTES = 64 * 2**20
"""Default budget of one chunk of logits on a CPU; in the reference, temporaries of the same size live beside it."""


def compute_dtype(*operands: Tensor) -> torch.dtype:
    """float64 if an operand is, else float32: a bfloat16 product is 35 times slower on a CPU and blurs the ratio."""
    return torch.float64 if any(operand.dtype == torch.float64 for operand in operands) else torch.float32


def logits_logprob(
    products: Tensor, token_ids: Tensor, bias: Tensor | None, transform: Transform
) -> tuple[Tensor, Tensor]:
    """``log_softmax(transform(products + bias))`` at ``token_ids`` [N], and its entropy, from raw products [N, V]."""
    logits = products if bias is None else products + bias
    forbidden = logits == -math.inf
    if transform.softcap > 0:
        capped = torch.tanh(logits * (transform.logit_scale / transform.softcap)) * transform.softcap
        logits = capped.masked_fill(forbidden, -math.inf)
    else:
        logits = logits * transform.logit_scale
    logprobs = (logits / transform.temperature).log_softmax(dim=1)
    # A forbidden id has p = 0 and log p = -inf: filled before the product, it counts 0 forward and backward.
    plogp = logprobs.exp() * logprobs.masked_fill(logprobs == -math.inf, 0.0)
    return logprobs.gather(1, token_ids.long()[:, None])[:, 0], -plogp.sum(dim=1)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None = None,
    transform: Transform = Transform(),  # noqa: B008 (an immutable tuple)
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each id and entropy of each row; see ``arft_fast.linear_logprob``.

    Rows go through in chunks; with a gradient to come, each chunk is computed again in the backward pass, so the logits
    of one chunk are all that ever lives.

    Returns:
        logprobs [N], entropy [N] in ``compute_dtype``.
    """
    dtype = compute_dtype(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):  # autocast would undo the upcast
        # Once, outside the chunks: their gradients then meet in ``dtype`` and are rounded once.
        weight = weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        rows = max(1, chunk_bytes // (weight.shape[0] * dtype.itemsize))
        operands = [hidden, weight] if bias is None else [hidden, weight, bias]
        # A single chunk fits the budget as it is; only several would add up until the backward pass.
        again = (
            hidden.shape[0] > rows and torch.is_grad_enabled() and any(operand.requires_grad for operand in operands)
        )
        pieces = []
        # No rows: split gives one empty chunk, and the result stays connected to the graph.
        for rows_of_chunk, ids_of_chunk in zip(torch.split(hidden, rows), torch.split(token_ids, rows), strict=True):
            piece = (rows_of_chunk, weight, ids_of_chunk, bias, transform)
            if again:
                pieces.append(checkpoint(_chunk_logprob, *piece, use_reentrant=False, preserve_rng_state=False))
            else:
                pieces.append(_chunk_logprob(*piece))
    logprobs, entropy = zip(*pieces, strict=True)
    return torch.cat(logprobs), torch.cat(entropy)


def _chunk_logprob(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, bias: Tensor | None, transform: Transform
) -> tuple[Tensor, Tensor]:
    return logits_logprob(linear(hidden.to(weight.dtype), weight), token_ids, bias, transform)


def policy_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    transform: Transform,
    rows: Rows,
    objective: Objective,
    chunk_bytes: int = CHUNK_BYTES,
    row_index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of ``objective`` with its gradient by autograd; see ``arft_fast.policy_loss``.

    Returns:
        loss 0-dim, logprobs [N], entropy [N]; the latter are 0 in masked tokens.
    """
    kept = rows.scale != 0
    # Whatever stands in a row of masked tokens, NaN too, takes no part.
    live = read_by(kept, row_index, len(hidden)).nonzero()[:, 0]
    some = linear_logprob(hidden[live], weight, token_ids[live], bias, transform, chunk_bytes)
    every = (rows.scale.new_zeros(len(hidden)).index_copy(0, live, values) for values in some)
    logprobs, entropy = (read(values, row_index, kept) for values in every)
    return weighted_sum(policy_terms(logprobs, entropy, rows, objective).loss, rows), logprobs, entropy
