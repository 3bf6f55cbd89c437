"""The prefix tree against one plain padded batch of stock transformers, in float64: log-probs and every gradient."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import arft_fast.policy.attention as attention
from arft_fast.kernels import policy_loss
from arft_fast.kernels.attention_tree import AttentionTree, Node
from arft_fast.kernels.prefix_attention import prefix_attention
from arft_fast.policy.batch import Batch, collate, collate_tree, tree_paths
from arft_fast.policy.forward import hidden_rows, score
from arft_fast.policy.micro_batches import micro_batches
from arft_fast.policy.model import Policy
from arft_fast.trajectory import Trajectory
from benchmarks.exact import no_float32
from tests.tree_models import group, make_model, on_trees, padded_logprobs, picture

EPSILON, BETA = 0.2, 0.04

FLAT = group("flat", ["a question of some length"], [([9 + k], k) for k in range(8)])
# Shared turns (equal seeds sample equal tokens), two identical trajectories, and one that ends inside another.
TRIE = group(
    "trie",
    ["a longer question, please"],
    [
        ([7, "first", 6, "second", 5], 1),
        ([7, "first", 6, "second", 5], 1),
        ([7, "first", 6, "other", 4], 1),
        ([7, "first", 6, "other", 3, "third", 4], 1),
        ([7, "first", 6, "other", 3, "fourth", 2], 1),
        ([7, "elsewhere", 5, "x", 3], 1),
        ([7, "elsewhere", 5, "y", 3], 1),
        ([7], 1),
        ([5], 7),
    ],
)
FOREST = [*FLAT, *group("other", ["nothing in common"], [([5], 20), ([8], 21)]), *TRIE]
# An image in the prompt; observations with different crops of one size, so that only their content tells them apart.
VISION = group(
    "vision",
    ["look: ", picture(1), "what is it?"],
    [
        ([6, "crop", picture(2), 5, "again", picture(3), 4], 1),
        ([6, "crop", picture(2), 5, "again", picture(4), 4], 1),
        ([6, "crop", picture(5), 5, "again", picture(3), 4], 1),
        ([6, "crop", picture(6, (8, 4)), 7], 1),
        ([9], 2),
        ([9], 3),
    ],
)
CASES = {"flat": ("qwen2", FLAT), "trie": ("qwen2", TRIE), "forest": ("qwen2", FOREST)}
CASES |= {kind: (kind, VISION) for kind in ("qwen2_5_vl", "qwen3_vl")}
CASES |= {f"crops, {kind}": (kind, VISION[:3]) for kind in ("qwen2_5_vl", "qwen3_vl")}
LIMIT = 1e-13
"""Largest absolute difference of a gradient, vision parameters included."""


@pytest.fixture(autouse=True)
def _in_float64() -> Iterator[None]:
    with no_float32():
        yield


@functools.cache
def _model(kind: str) -> PreTrainedModel:
    return make_model(kind)


def _given(trajectories: Sequence[Trajectory], logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Advantages [B] and old log-probs [N] around ``logprobs``, past the clip range on either side."""
    generator = torch.Generator().manual_seed(5)
    advantages = torch.randn(len(trajectories), generator=generator, dtype=torch.float64)
    return advantages, logprobs + 0.3 * torch.randn(len(logprobs), generator=generator, dtype=torch.float64)


def _reference_of(logprobs: Tensor) -> Tensor:
    """Log-probs of some reference policy: any function of the token and its past, so equal where those are."""
    return 0.9 * logprobs - 0.3


@functools.cache
def _padded(case: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs and gradients of GRPO's clipped loss with the k3 KL, on the padded batch, in so many words."""
    kind, trajectories = CASES[case]
    model = _model(kind)
    model.zero_grad()
    logprobs = padded_logprobs(model, trajectories)
    now = logprobs.detach()
    advantages, old = _given(trajectories, now)
    loss, start = torch.zeros((), dtype=torch.float64), 0
    for trajectory, advantage in zip(trajectories, advantages, strict=True):
        part = slice(start, start := start + trajectory.completion_length)
        ratio = torch.exp(logprobs[part] - old[part])
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantage)
        gap = _reference_of(now)[part] - logprobs[part]
        loss = loss - (surrogate - BETA * (gap.exp() - gap - 1)).mean() / len(trajectories)
    loss.backward()
    return now, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _backward(policy: Policy, batch: Batch, advantages: Tensor, old: Tensor, scale: float = 1.0) -> Tensor:
    """The same loss through ``policy_loss`` on distinct rows; gradients accumulate. Returns log-probs [N]."""
    rows = score(policy, batch)
    loss, _ = policy_loss(
        hidden_rows(policy, batch), policy.head.weight, batch.targets, advantages, cu_seqlens=batch.cu_seqlens,
        old_logprobs=old, ref_logprobs=_reference_of(rows), row_index=batch.terms, epsilon_low=EPSILON, beta=BETA,
        denominator=scale,
    )  # fmt: skip
    loss.backward()
    return batch.per_token(rows)


def _difference(policy: Policy, expected: dict[str, Tensor]) -> float:
    """The largest absolute difference of any gradient, vision parameters and all."""
    worst = 0.0
    for name, parameter in policy.model.named_parameters():
        actual = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        worst = max(worst, float((actual - expected.get(name, torch.zeros_like(parameter))).abs().max()))
    return worst


def _tree(policy: Policy, trajectories: Sequence[Trajectory]) -> Batch:
    return collate_tree(policy, trajectories, tree_paths(policy, trajectories))


@pytest.mark.parametrize("impl", ["cascade", "dense"])
@pytest.mark.parametrize("case", CASES)
def test_every_gradient_equals_the_padded_batch(case: str, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "prefix_attention", functools.partial(prefix_attention, impl=impl))
    kind, trajectories = CASES[case]
    now, expected = _padded(case)
    policy = on_trees(_model(kind))
    batch = _tree(policy, trajectories)
    assert batch.input_ids.numel() < sum(len(t.token_ids) for t in trajectories)
    logprobs = _backward(policy, batch, *_given(trajectories, now), scale=len(trajectories))
    assert (logprobs - now).abs().max() < 1e-12
    assert max(float(g.abs().max()) for g in expected.values()) > 0.1
    assert _difference(policy, expected) <= LIMIT
    vision = [name for name in expected if "visual" in name]
    assert bool(vision) == (kind != "qwen2"), "the vision tower takes part"


@pytest.mark.parametrize("case", ["trie", "qwen2_5_vl", "qwen3_vl"])
def test_gradient_checkpointing_changes_nothing(case: str) -> None:
    kind, trajectories = CASES[case]
    now, expected = _padded(case)
    policy = on_trees(_model(kind))
    policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = {name: 0 for name, module in policy.model.named_modules() if name.endswith(("self_attn", "blocks.0.attn"))}
    for name in calls:
        policy.model.get_submodule(name).register_forward_hook(lambda *_, n=name: calls.update({n: calls[n] + 1}))
    _backward(policy, _tree(policy, trajectories), *_given(trajectories, now), scale=len(trajectories))
    assert _difference(policy, expected) <= LIMIT
    assert set(calls.values()) == {3}  # scored without gradient, computed, and computed again in the backward pass
    assert not any(module.training for module in policy.model.modules())


@pytest.mark.parametrize(("case", "budget"), [("trie", 60), ("forest", 90), ("qwen2_5_vl", 70)])
def test_trees_cut_to_a_budget_give_the_same_gradient(case: str, budget: int) -> None:
    kind, trajectories = CASES[case]
    now, expected = _padded(case)
    advantages, old = _given(trajectories, now)
    olds = old.split([t.completion_length for t in trajectories])
    policy = on_trees(_model(kind))
    whole = _tree(policy, trajectories).input_ids.numel()
    sizes = []
    for chosen, batch in micro_batches(policy, trajectories, budget):
        sizes.append(batch.input_ids.numel())
        _backward(policy, batch, advantages[chosen], torch.cat([olds[i] for i in chosen]), scale=len(trajectories))
    assert len(sizes) >= 3 and max(sizes) <= budget
    assert sum(sizes) > whole, "ancestors are repeated"
    assert _difference(policy, expected) <= LIMIT


def test_identical_trajectories_cost_one_path_and_count_twice() -> None:
    policy = on_trees(_model("qwen2"))
    once, twice = _tree(policy, TRIE[:1]), _tree(policy, TRIE[:2])
    assert twice.input_ids.shape == once.input_ids.shape
    assert len(twice.rows) == len(once.rows)
    assert twice.terms is not None and len(twice.terms) == 2 * len(once.rows)


def test_each_distinct_image_goes_through_the_vision_tower_once() -> None:
    policy = on_trees(_model("qwen2_5_vl"))
    patches: list[int] = []
    hook = policy.model.model.visual.register_forward_pre_hook(lambda _, args: patches.append(len(args[0])))
    hidden_rows(policy, _tree(policy, VISION))
    hook.remove()
    distinct = {image.key: len(image.pixel_values) for t in VISION for image in t.images}
    assert patches == [sum(distinct.values())]
    assert sum(distinct.values()) * 2 < sum(len(image.pixel_values) for t in VISION for image in t.images)


def _chain(rows: int) -> AttentionTree:
    return AttentionTree([Node(0, rows, rows)])


def _ruined(wrong: str, policy: Policy, trajectories: Sequence[Trajectory]) -> Batch:
    batch = _tree(policy, trajectories)
    rows = batch.input_ids.shape[1]
    if wrong == "plain causal mask":
        return replace(batch, tree=_chain(rows))
    if wrong == "positions not restarted":
        return replace(batch, position_ids=torch.arange(rows).expand_as(batch.position_ids))
    if wrong == "stock attention":
        policy.model.set_attn_implementation("sdpa")
        return replace(batch, tree=None)
    assert wrong == "image content ignored"
    paths = [path._replace(keys=None) for path in tree_paths(policy, trajectories)]
    return collate_tree(policy, trajectories, paths)


@pytest.mark.parametrize(
    ("wrong", "case"),
    [
        ("plain causal mask", "flat"),
        ("plain causal mask", "qwen2_5_vl"),
        ("positions not restarted", "trie"),
        ("positions not restarted", "qwen2_5_vl"),
        ("stock attention", "flat"),
        ("image content ignored", "crops, qwen2_5_vl"),
        ("image content ignored", "crops, qwen3_vl"),
    ],
)
def test_negative_controls_fail_by_orders_of_magnitude(wrong: str, case: str) -> None:
    kind, trajectories = CASES[case]
    now, expected = _padded(case)
    policy = on_trees(_model(kind))
    _backward(policy, _ruined(wrong, policy, trajectories), *_given(trajectories, now), scale=len(trajectories))
    assert _difference(policy, expected) > 1e-3


def test_our_own_padded_batch_is_the_same_too() -> None:
    now, expected = _padded("qwen2_5_vl")
    policy = on_trees(_model("qwen2_5_vl"))
    _backward(policy, collate(policy, VISION), *_given(VISION, now), scale=len(VISION))
    assert _difference(policy, expected) <= LIMIT
