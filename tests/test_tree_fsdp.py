"""Trees under FSDP2: layers sharded over two ranks, each with a group of its own."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from arft_fast.policy.batch import collate, collate_tree, tree_paths
from arft_fast.policy.forward import hidden_rows
from arft_fast.policy.model import Policy
from benchmarks.exact import no_float32
from tests.tree_models import group, make_model, on_trees, picture

GROUPS = [
    group("a", ["look: ", picture(1), "and say"], [([6, "seen", picture(2), 5], 1), ([9], 2), ([9], 3)]),
    group("b", ["look: ", picture(3), "now"], [([4, "seen", picture(2), 5], 1), ([7], 2)]),
]


def _policy() -> Policy:
    policy = on_trees(make_model("qwen2_5_vl"))
    policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return policy


def _gradients(policy: Policy) -> dict[str, torch.Tensor]:
    return {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in policy.model.named_parameters()
        if p.grad is not None and "layers" in name
    }


@no_float32()
def _rank(rank: int, store: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    policy = _policy()
    for layer in policy.language_model.layers:  # type: ignore[union-attr]
        fully_shard(layer)
    mine = GROUPS[rank]
    hidden_rows(policy, collate_tree(policy, mine, tree_paths(policy, mine))).square().sum().backward()
    sharded = _gradients(policy)  # FSDP averages over ranks
    assert sharded and all(isinstance(p, DTensor) for p in policy.language_model.layers.parameters())  # type: ignore[union-attr]

    alone = _policy()
    for some in GROUPS:
        hidden = hidden_rows(alone, collate(alone, some))  # padded, unsharded
        rows = collate_tree(alone, some, tree_paths(alone, some)).terms
        weight = 1 / torch.bincount(rows)[rows]  # a row of the tree that several tokens read counts once
        (hidden.square().sum(-1) * weight).sum().backward()
    expected = _gradients(alone)
    assert expected.keys() == sharded.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(sharded[name] * 2, gradient, atol=1e-9, rtol=1e-9)
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-2
    dist.destroy_process_group()


def test_sharded_layers_with_checkpointing_give_the_padded_batchs_gradient(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(tmp_path / "store",), nprocs=2)
