"""The ways to run a group whose samples share a prompt: copies of it in a padded batch or packed, or a prefix tree.

All of them run the same model code, the same fused head on the rows that predict, and the same loss; so what differs is
what they compute more than once. Dimension letters: B samples, T padded length, S rows of a tree, N sampled tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from arft_fast.kernels import policy_loss
from arft_fast.kernels.prefix_attention import TreeImpl, prefix_attention
from arft_fast.observe.theory import ModelShape, Work, causal_pairs
from arft_fast.policy import attention
from arft_fast.policy.batch import Batch, collate, collate_tree, tree_paths
from arft_fast.policy.forward import hidden_rows, score
from arft_fast.policy.model import Policy
from arft_fast.trajectory import Trajectory

from .train_problem import TrainProblem

PADDED, PACKED, DENSE, CASCADE = "padded batch", "packed sequences", "tree, dense mask", "tree, cascade"
BETA = 0.04
_KEYS_OF_A_PATH = 2**32


@dataclass(frozen=True)
class TreeSide:
    """One way to run a group."""

    name: str
    collate: Callable[[Policy, Sequence[Trajectory]], Batch]
    impl: TreeImpl
    """Of the attention over a tree; a padded batch has none."""

    def work(self, shape: ModelShape, batch: Batch) -> Work:
        """What a pass over ``batch`` computes, for the formula; a pair that is masked costs as much as any other."""
        samples, length = batch.input_ids.shape
        if batch.tree is None:
            pairs = samples * causal_pairs(length)
        else:
            pairs = length**2 if self.impl == "dense" else batch.tree.pairs
        distinct = {image.key: image.grid_thw for image in batch.images}
        return Work(tokens=samples * length, pairs=pairs, rows=len(batch.rows)) + shape.look(distinct.values())


def padded_copies(policy: Policy, trajectories: Sequence[Trajectory]) -> Batch:
    """What transformers is handed: every sample whole, and every image once a sample."""
    return _image_copies(collate(policy, trajectories))


def packed_copies(policy: Policy, trajectories: Sequence[Trajectory]) -> Batch:
    """The same without padding: sequences one after the other in one row, each looking at itself only.

    That is a forest in which nothing is merged; the cascade then runs one plain causal flash call a sequence.
    """
    paths = [
        path._replace(keys=b * _KEYS_OF_A_PATH + np.arange(len(path.token_ids)))
        for b, path in enumerate(tree_paths(policy, trajectories))
    ]
    return replace(_image_copies(collate_tree(policy, trajectories, paths)), terms=None)


def merged(policy: Policy, trajectories: Sequence[Trajectory]) -> Batch:
    """The prefix tree."""
    return collate_tree(policy, trajectories, tree_paths(policy, trajectories))


def _image_copies(batch: Batch) -> Batch:
    """Names every copy of an image differently: the vision tower runs once for each."""
    images = [replace(image, key=f"{number} {image.key}") for number, image in enumerate(batch.images)]
    return replace(batch, images=images)


SIDES = (
    TreeSide(PADDED, padded_copies, "auto"),
    TreeSide(PACKED, packed_copies, "cascade"),
    TreeSide(DENSE, merged, "dense"),
    TreeSide(CASCADE, merged, "cascade"),
)


@contextmanager
def attention_by(impl: TreeImpl) -> Iterator[None]:
    """The policy's attention over trees takes ``impl`` inside the block."""
    with mock.patch.object(attention, "prefix_attention", partial(prefix_attention, impl=impl)):
        yield


@dataclass(frozen=True, eq=False)
class TreeStep:
    """Forward and backward of one side; gradients stay in the parameters."""

    policy: Policy
    side: TreeSide
    batch: Batch
    advantages: Tensor
    """[B]"""
    ref_logprobs: Tensor
    """[M], of the batch's rows."""

    def __call__(self) -> Tensor:
        """The loss of one on-policy GRPO update with a KL term, detached."""
        with attention_by(self.side.impl):
            loss, _ = policy_loss(
                hidden_rows(self.policy, self.batch), self.policy.head.weight, self.batch.targets, self.advantages,
                row_index=self.batch.terms, cu_seqlens=self.batch.cu_seqlens, ref_logprobs=self.ref_logprobs,
                bias=self.policy.logit_bias, beta=BETA,
            )  # fmt: skip
            loss.backward()
        return loss.detach()

    def forget_gradients(self) -> None:
        self.policy.model.zero_grad(set_to_none=True)

    def take_gradients(self) -> dict[str, Tensor]:
        """By parameter, on the CPU; the model has none afterwards."""
        found = {name: p.grad.cpu() for name, p in self.policy.model.named_parameters() if p.grad is not None}
        self.forget_gradients()
        return found


def steps_of(policy: Policy, reference: Policy, problem: TrainProblem, sides: Sequence[TreeSide]) -> list[TreeStep]:
    """The sides' steps on one problem. The reference scores once, on a tree: its log-probs are given, not measured."""
    tree = merged(reference, problem.trajectories)
    ref_logprobs = tree.per_token(score(reference, tree))
    advantages = problem.advantages.to(policy.device, ref_logprobs.dtype)
    return [
        TreeStep(policy, side, batch, advantages, _of_rows(batch, ref_logprobs))
        for side in sides
        for batch in [side.collate(policy, problem.trajectories)]
    ]


def _of_rows(batch: Batch, values: Tensor) -> Tensor:
    """[M] from values of the sampled tokens [N], equal wherever tokens share a row."""
    if batch.terms is None:
        return values
    return torch.empty_like(values[: len(batch.rows)]).index_copy(0, batch.terms, values)
