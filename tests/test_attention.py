from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from arft_fast.policy.attention import attend


@pytest.mark.parametrize(("heads", "key_heads", "length"), [(6, 2, 1), (6, 2, 16), (4, 4, 3), (8, 1, 2)])
def test_folding_a_group_into_the_queries_changes_nothing(heads: int, key_heads: int, length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = {"generator": generator, "dtype": torch.float64}
    query = torch.randn(3, heads, length, 8, **shape)
    key, value = (torch.randn(3, key_heads, 20, 8, **shape) for _ in range(2))
    mask = torch.rand(3, 1, length, 20, generator=generator) < 0.7
    mask[..., 0] = True
    module = nn.Module()
    module.num_key_value_groups = heads // key_heads
    ours, _ = attend(module, query, key, value, mask, scaling=0.3)
    theirs, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    other, _ = attend(module, query, key, value, mask.roll(1, -1), scaling=0.3)
    assert (ours - other).abs().max() > 1e-3
