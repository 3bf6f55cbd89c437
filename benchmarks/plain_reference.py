"""One GRPO update written as plainly as Visual-ARFT's trainer writes it: nothing is shared, skipped or fused.

Every sample is a padded copy of prompt and image, so the vision tower runs once a sample; logits of the whole padded
sequence; log-softmax and gather; the same again for the reference; k3 KL; a mean over each sample's tokens, then over
samples; AdamW. The model is transformers' own, called as its documentation says, with stock ``sdpa`` attention.
Source: arXiv 2505.14246 and its trainer, which inherits this from R1-V.

Dimension letters: G samples of a prompt, T padded length, N sampled tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from arft_fast.trajectory import Trajectory


def plain_update(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    groups: Sequence[Sequence[Trajectory]],
    advantages: Tensor,
    *,
    logit_bias: Tensor,
    beta: float,
    temperature: float = 1.0,
    max_grad_norm: float = 1.0,
) -> tuple[float, dict[str, float]]:
    """Gradients, clipping and a step; the arguments and the result are those of ``plain_backward``."""
    found = plain_backward(
        model, reference, groups, advantages, logit_bias=logit_bias, beta=beta, temperature=temperature
    )
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return found


def plain_backward(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    groups: Sequence[Sequence[Trajectory]],
    advantages: Tensor,
    *,
    logit_bias: Tensor,
    beta: float,
    temperature: float = 1.0,
) -> tuple[float, dict[str, float]]:
    """The loss of all groups, one prompt at a time; gradients stay in the parameters.

    Args:
        advantages: one a sample, group by group.
        logit_bias: [V], added to the logits: -inf forbids an id.

    Returns:
        The loss, and ``entropy``, ``kl`` and ``sampler_gap``: means over the sampled tokens of all samples.
    """
    samples = sum(len(group) for group in groups)
    loss_sum, tokens = 0.0, 0.0
    sums = dict.fromkeys(("entropy", "kl", "sampler_gap"), 0.0)
    for group, advantage in zip(groups, advantages.to(model.device).split([len(g) for g in groups]), strict=True):
        inputs, mask, sampler = padded(model, group)
        logprobs, entropy = token_logprobs(model, inputs, mask, logit_bias, temperature)
        with torch.no_grad():
            ref_logprobs, _ = token_logprobs(reference, inputs, mask, logit_bias, temperature)
        ratio = torch.exp(logprobs - logprobs.detach())
        kl = torch.exp(ref_logprobs - logprobs) - (ref_logprobs - logprobs) - 1
        per_token = -(ratio * advantage[:, None] - beta * kl)
        loss = ((per_token * mask).sum(1) / mask.sum(1)).sum() / samples
        loss.backward()
        loss_sum += float(loss.detach())
        tokens += float(mask.sum())
        sums["entropy"] += float(entropy.sum())
        sums["kl"] += float((kl.detach() * mask).sum())
        sums["sampler_gap"] += float(((logprobs.detach() - sampler).abs() * mask).sum())
    return loss_sum, {name: value / tokens for name, value in sums.items()}


def token_logprobs(
    model: PreTrainedModel, inputs: dict[str, Tensor], mask: Tensor, logit_bias: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probs of the sampled ids, 0 elsewhere [G, T - 1], and the entropy of their rows [N] as a metric."""
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) + logit_bias
    distribution = (logits / temperature).log_softmax(dim=-1)
    logprobs = distribution.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0].masked_fill(~mask, 0.0)
    entropy = torch.special.entr(distribution.detach()[mask].exp()).sum(-1)
    return logprobs, entropy


def padded(model: PreTrainedModel, group: Sequence[Trajectory]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """What transformers' model takes for a group, padded on the right.

    Returns:
        The model's arguments [G, T], and which of the last T - 1 tokens were sampled, with the sampler's log-probs.
    """
    shape = len(group), max(len(t.token_ids) for t in group)
    ids, attention, sampled = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    sampler = torch.zeros(shape)
    for b, trajectory in enumerate(group):
        length = len(trajectory.token_ids)
        ids[b, :length] = torch.from_numpy(trajectory.token_ids)
        attention[b, :length] = 1
        sampled[b, :length] = torch.from_numpy(trajectory.policy_mask)
        sampler[b, :length] = torch.from_numpy(trajectory.logprobs)
    inputs = {"input_ids": ids, "attention_mask": attention}
    if images := [image for trajectory in group for image in trajectory.images]:
        inputs["pixel_values"] = torch.cat([image.pixel_values for image in images])
        inputs["image_grid_thw"] = torch.tensor([image.grid_thw for image in images])
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()  # without it: positions of a text
    inputs = {name: values.to(model.device) for name, values in inputs.items()}
    return inputs, sampled[:, 1:].bool().to(model.device), sampler[:, 1:].to(model.device)
