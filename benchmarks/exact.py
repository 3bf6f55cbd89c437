"""Qwen models in float64 throughout, for comparisons below what float32 shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor, nn
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3_vl

_NORMS = (qwen2.Qwen2RMSNorm, qwen2_5_vl.Qwen2_5_VLRMSNorm, qwen3_vl.Qwen3VLTextRMSNorm)
_VISION = (qwen2_5_vl, qwen3_vl)


@contextmanager
def no_float32() -> Iterator[None]:
    """RMSNorm and the vision tower's rotation work in the dtype of their input inside the block.

    transformers rounds to float32 there, values and gradients; a sum of rounded gradients then differs from a rounded
    sum by up to 1e-7 of it.
    """
    with ExitStack() as stack:
        for norm in _NORMS:
            stack.enter_context(mock.patch.object(norm, "forward", _norm))
        for modeling in _VISION:
            stack.enter_context(mock.patch.object(modeling, "apply_rotary_pos_emb_vision", _rotate))
        yield


def _norm(self: nn.Module, x: Tensor) -> Tensor:
    weight, epsilon = self.weight, self.variance_epsilon
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon))


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(-2).to(q.dtype), sin.unsqueeze(-2).to(q.dtype)
    half = qwen2_5_vl.rotate_half
    return q * cos + half(q) * sin, k * cos + half(k) * sin
