from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

import arft_fast.policy.tree_guard as tree_guard
from arft_fast.kernels.attention_tree import AttentionTree, Node
from arft_fast.policy.batch import Batch, collate, collate_tree
from arft_fast.policy.forward import score
from arft_fast.policy.micro_batches import check_first_batch, micro_batches
from arft_fast.policy.model import Policy
from arft_fast.policy.tree_guard import TreeMismatch, check_tree, obstacle
from arft_fast.trajectory import Ending
from tests.tree_models import group, make_model, on_trees, padded_logprobs, picture

GROUP = group("a", ["look: ", picture(1), "and say"], [([6, "seen", picture(2), 5], 1), ([9], 2), ([9], 3), ([4], 4)])
TEXT = group("t", ["a question of some length"], [([9], k) for k in range(4)])


def _windowed(window: int) -> Policy:
    config = Qwen2Config(
        vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, use_sliding_window=True, sliding_window=window, max_window_layers=1,
        initializer_range=0.2, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return on_trees(Qwen2ForCausalLM(config).double().eval())


@pytest.mark.parametrize("kind", ["qwen2", "qwen2_5_vl", "qwen3_vl"])
def test_a_model_with_full_attention_may_use_a_tree(kind: str) -> None:
    assert obstacle(on_trees(make_model(kind)).model, 10_000) is None


def test_a_window_stands_in_the_way_only_of_paths_that_are_longer() -> None:
    model = _windowed(16).model
    assert obstacle(model, 16) is None
    assert "window of 16 tokens, and a path has 17" in str(obstacle(model, 17))


def test_dropout_stands_in_the_way_while_it_acts() -> None:
    model = on_trees(make_model("qwen2")).model
    model.config.attention_dropout = 0.1
    assert obstacle(model, 10) is None
    assert "dropout of 0.1" in str(obstacle(model.train(), 10))
    model.config.attention_dropout = 0.0
    assert obstacle(model, 10) is None
    model.add_module("adapter", nn.Dropout(0.05))
    assert "dropout of 0.05" in str(obstacle(model, 10))


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("layer_types", ["linear_attention", "full_attention", "full_attention"], "linear_attention"),
        ("layer_types", ["full_attention", "mamba", "full_attention"], "mamba"),
        ("use_bidirectional_attention", True, "look ahead"),
    ],
)
def test_layers_that_do_not_attend_to_all_ancestors_stand_in_the_way(name: str, value: Any, reason: str) -> None:
    model = on_trees(make_model("qwen2")).model
    setattr(model.config, name, value)
    assert reason in str(obstacle(model, 10))


def test_another_attention_implementation_stands_in_the_way() -> None:
    model = on_trees(make_model("qwen2")).model
    model.set_attn_implementation("eager")
    assert "'eager' attention" in str(obstacle(model, 10))


def test_a_model_that_cannot_falls_back_to_padded_batches_says_so_once_and_stays_exact() -> None:
    policy = _windowed(8)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(3):
            batches = list(micro_batches(policy, TEXT, 10_000))
    assert [str(w.message) for w in said] == [
        "no prefix tree, every trajectory is computed by itself: its layers see a window of 8 tokens, and a path has 34"
    ]
    ((chosen, batch),) = batches
    assert batch.tree is None and sorted(chosen) == [0, 1, 2, 3]
    stock = Qwen2ForCausalLM(policy.model.config).double().eval()
    stock.load_state_dict(policy.model.state_dict())
    stock.set_attn_implementation("sdpa")
    expected = padded_logprobs(stock, [TEXT[i] for i in chosen])
    torch.testing.assert_close(score(policy, batch), expected.detach(), atol=1e-12, rtol=0)


def test_a_tree_within_the_window_is_exact() -> None:
    policy = _windowed(64)
    ((chosen, batch),) = micro_batches(policy, TEXT, 10_000)
    assert batch.tree is not None
    tree, padded = batch.per_token(score(policy, batch)), score(policy, collate(policy, [TEXT[i] for i in chosen]))
    torch.testing.assert_close(tree, padded, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_the_check_passes_for_a_sound_tree_and_leaves_nothing_behind(kind: str, dtype: torch.dtype) -> None:
    policy = on_trees(make_model(kind))
    policy.model.to(dtype)
    check = check_tree(policy, GROUP)
    assert check.gradient_cosine > 0.98
    assert check.logprob_gap > 0 or dtype == torch.float64
    assert all(p.grad is None for p in policy.model.parameters())


def _ruin(wrong: str) -> Any:
    def ruined(policy: Policy, trajectories: Sequence[Any], paths: Sequence[Any]) -> Batch:
        batch = collate_tree(policy, trajectories, paths)
        rows = batch.input_ids.shape[1]
        if wrong == "mask":
            return replace(batch, tree=AttentionTree([Node(0, rows, rows)]))
        if wrong == "positions":
            return replace(batch, position_ids=torch.arange(rows).expand_as(batch.position_ids))
        return collate_tree(policy, trajectories, [path._replace(keys=None) for path in paths])

    return ruined


CROPS = group("c", ["look: "], [([5, "crop", picture(2), 6], 1), ([5, "crop", picture(3), 6], 1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", ["mask", "positions", "images"])
def test_the_check_stops_a_wrong_tree(wrong: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = on_trees(make_model("qwen2_5_vl"))
    policy.model.to(dtype)
    monkeypatch.setattr(tree_guard, "collate_tree", _ruin(wrong))
    with pytest.raises(TreeMismatch, match=r"train\.prefix_tree = false"):
        check_tree(policy, CROPS if wrong == "images" else GROUP)


def test_the_check_stops_values_that_are_not_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = on_trees(make_model("qwen2"))
    with torch.no_grad():
        policy.head.weight[0, 0] = float("nan")
    with pytest.raises(TreeMismatch):
        check_tree(policy, TEXT)


def test_the_first_batch_is_checked_without_broken_trajectories() -> None:
    policy = on_trees(make_model("qwen2"))
    broken = replace(TEXT[0], ending=Ending.INFRA_FAULT)
    assert check_first_batch(policy, [broken, *TEXT[1:]], 10_000, temperature=0.7) is not None
    assert check_first_batch(policy, [broken], 10_000, temperature=0.7) is None
