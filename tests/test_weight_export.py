from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from arft_fast.policy.model import Policy, load_policy
from arft_fast.rollout.weight_export import buckets, checkpoint_tensors


def _saved(policy: Policy, folder: Path) -> dict[str, Tensor]:
    policy.model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def _untied(policy: Policy, folder: Path) -> Policy:
    """The same policy with a head of its own, from a checkpoint: tying is settled when a model is loaded."""
    model = policy.model
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)
    policy.save(folder)
    return load_policy(folder, device=torch.device("cpu"), dtype=torch.float32)


def _is_written_like(policy: Policy, saved: dict[str, Tensor]) -> bool:
    exported = list(checkpoint_tensors(policy))
    names = [name for name, _ in exported]
    return sorted(names) == sorted(saved) and all(torch.equal(tensor, saved[name]) for name, tensor in exported)


def test_a_tied_policy_is_exported_as_it_is_saved(policy: Policy, tmp_path: Path) -> None:
    saved = _saved(policy, tmp_path)
    assert "lm_head.weight" not in saved
    assert _is_written_like(policy, saved)


def test_an_untied_policy_is_exported_as_it_is_saved(policy: Policy, tmp_path: Path) -> None:
    untied = _untied(policy, tmp_path / "untied")
    saved = _saved(untied, tmp_path / "saved")
    assert "lm_head.weight" in saved
    assert _is_written_like(untied, saved)


def test_the_names_of_the_modules_would_not_do(policy: Policy, tmp_path: Path) -> None:
    assert not set(_saved(policy, tmp_path)) <= set(policy.model.state_dict())


def test_a_changed_weight_is_exported(policy: Policy, tmp_path: Path) -> None:
    saved = _saved(policy, tmp_path)
    with torch.no_grad():
        policy.model.model.visual.merger.mlp[0].weight += 1
    assert not _is_written_like(policy, saved)


def test_the_export_copies_nothing(policy: Policy) -> None:
    own = {parameter.data_ptr() for parameter in policy.model.parameters()}
    assert {tensor.data_ptr() for _, tensor in checkpoint_tensors(policy)} == own


def test_buckets_keep_the_order_and_their_size(policy: Policy) -> None:
    tensors = list(checkpoint_tensors(policy))
    size = max(tensor.nbytes for _, tensor in tensors)
    filled = list(buckets(tensors, size))
    assert [name for bucket in filled for name, _ in bucket] == [name for name, _ in tensors]
    assert max(sum(tensor.nbytes for _, tensor in bucket) for bucket in filled) <= size
    assert 1 < len(filled) < len(tensors)


def test_a_tensor_above_the_size_travels_alone() -> None:
    tensors = [("a", torch.zeros(1)), ("b", torch.zeros(9)), ("c", torch.zeros(1))]
    assert [[name for name, _ in bucket] for bucket in buckets(tensors, 8)] == [["a"], ["b"], ["c"]]


def test_no_tensors_make_no_bucket() -> None:
    assert list(buckets([], 8)) == []


def test_a_size_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="size: 0 bytes"):
        list(buckets([], 0))
