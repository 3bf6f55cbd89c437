from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.vision_utils import get_vision_window_index

from arft_fast.kernels import policy_loss, prefix_attention
from arft_fast.observe.theory import (
    Grid,
    ModelShape,
    VisionShape,
    Work,
    backward_flops,
    causal_pairs,
    forward_flops,
    train_flops,
)
from arft_fast.policy.batch import collate_tree, tree_paths
from arft_fast.policy.forward import hidden_rows
from arft_fast.policy.model import Policy
from arft_fast.policy.packing import tree_work
from arft_fast.trajectory import Trajectory
from benchmarks.flops import counted_flops
from tests.tree_models import IMAGE, VISION_END, VISION_START, Piece, group, make_model, on_trees, picture

GRIDS = [(1, 10, 18), (1, 8, 6)]
FAMILIES = ["qwen2", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


def _model(kind: str) -> Any:
    if kind != "qwen2_vl":
        return make_model(kind)
    text = {
        "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {"depth": 3, "embed_dim": 32, "mlp_ratio": 2, "num_heads": 2, "hidden_size": 48}
    ids: dict[str, Any] = {
        "image_token_id": IMAGE,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **ids)).double()


def _pass(model: Any, length: int = 150, rows: int = 40) -> tuple[Work, int, int]:
    """Two sequences, an image in each: the work of it, and what forward and backward count."""
    ids = torch.randint(0, 80, (2, length), generator=torch.Generator().manual_seed(0))
    shape = ModelShape.of(model.config)
    inputs: dict[str, Any] = {}
    grids: list[Grid] = []
    if shape.vision is not None:
        for row, (_, height, width) in zip(ids, GRIDS, strict=True):
            tokens = height * width // 4
            row[3], row[4 : 4 + tokens], row[4 + tokens] = VISION_START, IMAGE, VISION_END
        grids = GRIDS
        inputs = {
            "pixel_values": torch.randn(sum(h * w for _, h, w in GRIDS), 3 * 2 * 14 * 14, dtype=model.dtype),
            "image_grid_thw": torch.tensor(GRIDS),
            "mm_token_type_ids": (ids == IMAGE).int(),
        }
    work = Work(tokens=2 * length, pairs=2 * causal_pairs(length), rows=rows) + shape.look(grids)
    with counted_flops() as forward:
        hidden = model.model(input_ids=ids, use_cache=False, **inputs).last_hidden_state
        loss = model.lm_head(hidden.flatten(0, 1)[:rows]).logsumexp(-1).sum()
    with counted_flops() as backward:
        loss.backward()
    return work, forward.total, backward.total


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_formula_is_what_a_pass_counts(kind: str, checkpointing: bool) -> None:
    model = _model(kind).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    work, forward, backward = _pass(model)
    shape = ModelShape.of(model.config)
    assert forward_flops(shape, work) == pytest.approx(forward, rel=2e-4)  # rotary angles: one small product
    assert backward_flops(shape, work, gradient_checkpointing=checkpointing) == pytest.approx(backward, rel=1e-6)
    wrong = backward_flops(shape, work, gradient_checkpointing=not checkpointing)
    assert abs(wrong - backward) > 0.1 * backward


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("kind", FAMILIES[1:])
def test_a_frozen_vision_tower_costs_its_forward_only(kind: str, checkpointing: bool) -> None:
    model = _model(kind).train()
    model.model.visual.requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.disable_input_require_grads()  # transformers asks for gradients of the patches, frozen or not
    work, forward, backward = _pass(model)
    shape = ModelShape.of(model.config)
    assert forward_flops(shape, work) == pytest.approx(forward, rel=2e-4)
    formula = backward_flops(shape, work, frozen_vision=True, gradient_checkpointing=checkpointing)
    assert formula == pytest.approx(backward, rel=1e-6)


def test_the_tiny_policy_counts_what_the_formula_says_within_three_percent(policy: Policy) -> None:
    config = policy.model.config
    ids = torch.randint(0, 300, (2, 120), generator=torch.Generator().manual_seed(0))
    for row in ids:
        row[3], row[4:20], row[20] = config.vision_start_token_id, config.image_token_id, config.vision_end_token_id
    grids = torch.tensor([(1, 8, 8)] * 2)
    with counted_flops() as count:
        hidden = policy.model.model(
            input_ids=ids, pixel_values=torch.randn(128, 1176), image_grid_thw=grids, use_cache=False,
            mm_token_type_ids=(ids == config.image_token_id).int(),
        ).last_hidden_state  # fmt: skip
        (hidden[:, 60:].flatten(0, 1) @ policy.head.weight.T).logsumexp(-1).sum().backward()
    shape = ModelShape.of(config)
    work = Work(tokens=240, pairs=2 * causal_pairs(120), rows=120) + shape.look([(1, 8, 8)] * 2)
    assert train_flops(shape, work) == pytest.approx(count.total, rel=1e-3)


def _group() -> list[Trajectory]:
    """A picture in the prompt and one in a turn that two of five samples share."""
    turn: list[Piece] = [7, "and seen: ", picture(2, (8, 8))]
    branches: list[tuple[list[Piece], int]] = [
        ([12, "now?", 30], 1), ([25], 2), ([*turn, 20], 3), ([*turn, 31], 3), ([28], 4),
    ]  # fmt: skip
    return group("a", ["look closely: ", picture(1, (10, 18)), "and say"], branches)


@pytest.mark.parametrize("impl", ["native"], indirect=True)
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("attention", ["cascade", "dense"])
def test_an_update_of_a_tree_counts_what_was_foretold(
    kind: str, attention: Any, impl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, trajectories = on_trees(make_model(kind)), _group()
    paths = tree_paths(policy, trajectories)
    images = {image.key: image for t in trajectories for image in t.images}
    batch = collate_tree(policy, trajectories, paths)
    shape = ModelShape.of(policy.model.config)
    work = tree_work(paths, shape, {key: image.grid_thw for key, image in images.items()})
    assert batch.tree is not None
    if attention == "dense":
        work = replace(work, pairs=work.tokens**2)
    attend_by = partial(prefix_attention, impl=attention)
    operands = torch.zeros(3, 1, 1, batch.tree.rows, 8, dtype=torch.float64)
    attend_by(*operands, batch.tree)  # so that the self-test is not counted
    monkeypatch.setattr("arft_fast.policy.attention.prefix_attention", attend_by)
    with counted_flops() as count:
        loss, _ = policy_loss(
            hidden_rows(policy, batch), policy.head.weight, batch.targets, torch.ones(5), cu_seqlens=batch.cu_seqlens,
            row_index=batch.terms, impl=impl,
        )  # fmt: skip
        loss.backward()
    assert train_flops(shape, work) == pytest.approx(count.total, rel=1e-3)
    apart = sum((tree_work([p], shape) for p in paths), Work()) + shape.look(i.grid_thw for i in images.values())
    assert train_flops(shape, apart) > 1.1 * count.total


def _qwen2_5_vl(hidden: int, layers: int, heads: int, key_value: int, inner: int, vocabulary: int) -> ModelShape:
    text = {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": vocabulary,
        "num_key_value_heads": key_value, "intermediate_size": inner,
    }  # fmt: skip
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": hidden}
    return ModelShape.of(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


THREE_B = _qwen2_5_vl(2048, 36, 16, 2, 11008, 151936)
SEVEN_B = _qwen2_5_vl(3584, 28, 28, 4, 18944, 152064)


def test_the_published_models_have_their_known_weights() -> None:
    assert THREE_B.body_weights == pytest.approx(2.77e9, rel=2e-3)
    assert SEVEN_B.body_weights == pytest.approx(6.53e9, rel=2e-3)
    assert THREE_B.vision is not None
    assert THREE_B.vision.depth * THREE_B.vision.layer.weights == pytest.approx(0.63e9, rel=2e-3)
    assert (THREE_B.vision.full_layers, THREE_B.vision.window) == (4, 4)


@pytest.mark.parametrize(
    ("shape", "prompt", "completion", "grid", "gain"),
    [
        (THREE_B, 1200, 150, (1, 40, 50), 5.16),
        (SEVEN_B, 1200, 150, (1, 40, 50), 4.88),
        (THREE_B, 1500, 250, (1, 32, 64), 4.51),
        (SEVEN_B, 1500, 250, (1, 32, 64), 4.28),
    ],
)
def test_a_group_of_eight_gains_what_was_worked_out_by_hand(
    shape: ModelShape, prompt: int, completion: int, grid: tuple[int, int, int], gain: float
) -> None:
    samples, path = 8, prompt + completion
    alone = Work(tokens=samples * path, pairs=samples * causal_pairs(path), rows=samples * path)
    alone += shape.look([grid] * samples)
    pairs = causal_pairs(prompt) + samples * (causal_pairs(path) - causal_pairs(prompt))
    tree = Work(tokens=prompt + samples * completion, pairs=pairs, rows=samples * completion) + shape.look([grid])
    assert forward_flops(shape, alone) / forward_flops(shape, tree) == pytest.approx(gain, rel=0.01)


def test_works_add_up_and_so_do_their_operations() -> None:
    first, second = Work(tokens=5, pairs=15, rows=2, patches=8, patch_pairs=64), Work(tokens=7, pairs=28)
    assert first + second == Work(tokens=12, pairs=43, rows=2, patches=8, patch_pairs=64)
    for flops in (forward_flops, backward_flops, train_flops):
        assert flops(THREE_B, first) + flops(THREE_B, second) == flops(THREE_B, first + second)


@pytest.mark.parametrize("grid", [(1, 4, 6), (1, 16, 16), (2, 20, 34), (1, 8, 50)])
def test_the_pairs_of_windows_are_those_of_the_models_windows(grid: tuple[int, int, int]) -> None:
    frames, height, width = grid
    _, cumulative = get_vision_window_index(
        torch.tensor([grid]), spatial_merge_size=2, window_size=112, patch_size=14, kwargs={}
    )
    windows = int(cumulative.unique().diff().square().sum())
    assert THREE_B.vision is not None
    assert THREE_B.look([grid]).patch_pairs == 28 * windows + 4 * frames * (height * width) ** 2


def test_a_model_that_the_formula_does_not_know_is_refused() -> None:
    text = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
    with pytest.raises(ValueError, match=r"config: 'moe' is a mixture of experts; give a ModelShape"):
        ModelShape.of(SimpleNamespace(**text, num_experts=4, model_type="moe"))
    with pytest.raises(ValueError, match=r"layers of type \['linear_attention'\]"):
        ModelShape.of(SimpleNamespace(**text, layer_types=["full_attention", "linear_attention"]))
    with pytest.raises(ValueError, match=r"config: 'siglip' is no vision tower .* give a VisionShape"):
        VisionShape.of(SimpleNamespace(model_type="siglip", hidden_size=8))
    with pytest.raises(ValueError, match=r"grids: 1 images for a model without a vision tower"):
        ModelShape.of(SimpleNamespace(**text)).look([(1, 2, 2)])
