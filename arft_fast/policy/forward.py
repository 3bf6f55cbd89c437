"""The policy's forward pass: hidden states of exactly the rows that predict a sampled token, and their log-probs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from arft_fast.kernels import linear_logprob
from arft_fast.policy.batch import Batch
from arft_fast.policy.model import Policy
from arft_fast.policy.vision import embed, image_features


def hidden_rows(policy: Policy, batch: Batch) -> Tensor:
    """[M, D] last hidden states of the rows that predict a sampled token; no logits are made here."""
    # No mask: padding stands on the right, where a causal row never looks, and a tree knows who may look where. The
    # tree travels as an argument, so that it is there again when gradient checkpointing repeats a layer.
    tree = {} if batch.tree is None else {"tree": batch.tree}
    with _checkpointing(policy.model):
        by_key = image_features(policy.model, batch.images)
        inputs = embed(policy.model, batch.input_ids, [by_key[image.key] for image in batch.images])
        output = policy.language_model(
            **inputs, position_ids=batch.position_ids, attention_mask=None, use_cache=False, **tree
        )
    hidden: Tensor = output.last_hidden_state
    return hidden.flatten(0, 1).index_select(0, batch.rows)


@contextmanager
def _checkpointing(model: PreTrainedModel) -> Iterator[None]:
    """Lets layers that are told to checkpoint do so while a gradient is wanted.

    transformers' layers do it in training mode only, and then take no cache: the policy stays in evaluation mode, for
    its engine and without dropout, and only the layers' own flag is set for this forward pass.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    before = [layer.training for layer in layers]
    try:
        for layer in layers:
            layer.training = torch.is_grad_enabled()
        yield
    finally:
        for layer, training in zip(layers, before, strict=True):
            layer.training = training


@torch.no_grad()
def score(policy: Policy, batch: Batch, temperature: float = 1.0) -> Tensor:
    """[M] log-probs of the batch's rows; nothing is kept for a backward pass."""
    hidden = hidden_rows(policy, batch)
    logprobs, _ = linear_logprob(
        hidden, policy.head.weight, batch.targets, bias=policy.logit_bias, temperature=temperature
    )
    return logprobs
