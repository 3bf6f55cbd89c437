"""The gate of whole steps: a trainer's samples, their distribution, their advantages, and the update on them.

Everything is computed anew on the stock models, from the samples' ids alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from arft_fast.trajectory import Prompt, Trajectory

from .end_to_end_sides import Side
from .plain_reference import padded, plain_backward
from .plain_rollout import ImageTextProcessor, group_relative, model_inputs, open_processor
from .step_problem import OneTurn, even_share
from .train_problem import Models, TrainProblem, open_stock
from .train_sides import AT_MOST, BETA, Errors, Found, errors_of, take_gradients

MOST_DEVIATIONS = 5.0
"""Of the samples' log-probs from their expectation, in standard deviations: by chance once in two million."""


class AnotherStep(ValueError):
    """A side does not do what all are to do; the text says where."""


@dataclass(frozen=True)
class Judge:
    """Stock models with the weights that every side starts from, and the stock processor."""

    model: PreTrainedModel
    reference: PreTrainedModel
    processor: ImageTextProcessor
    task: OneTurn

    def examine(self, side: Side, prompts: Sequence[Prompt]) -> Errors:
        """Let a new side rehearse, and look at all that it did.

        Returns:
            Its loss, gradients and metrics against those of the plain reference on its samples.

        Raises:
            AnotherStep: prompts, lengths, forbidden ids, sampling, recorded log-probs, advantages or update are wrong.
        """
        samples, found = side.rehearse(prompts)
        self.check_samples(samples, prompts)
        self.check_sampling(samples, recorded=side.records_logprobs)
        self.check_advantages(samples)
        return self.check_update(samples, found)

    def check_samples(self, samples: TrainProblem, prompts: Sequence[Prompt]) -> None:
        """All samples of all prompts are there, whole, and of the asked length."""
        shape = self.task.shape
        if [len(group) for group in samples.groups] != [shape.samples] * len(prompts):
            raise AnotherStep(f"groups of {[len(group) for group in samples.groups]} samples")
        for prompt, group in zip(prompts, samples.groups, strict=True):
            inputs = model_inputs(self.processor, prompt)
            for trajectory in group:
                _check_turn(trajectory, inputs["input_ids"][0], inputs["pixel_values"], self.task)

    @torch.no_grad()
    def check_sampling(self, samples: TrainProblem, *, recorded: bool) -> None:
        """What was drawn has the policy's probabilities at temperature 1, and recorded log-probs are those."""
        bias = self.task.suppressing(torch.zeros(self.model.config.get_text_config().vocab_size))
        excess, variance, gap, count = 0.0, 0.0, 0.0, 0
        for group in samples.groups:
            inputs, mask, sampler = padded(self.model, group)
            logits = self.model(**inputs, use_cache=False).logits[:, :-1][mask].double() + bias.to(self.model.device)
            logprobs = logits.log_softmax(-1)
            drawn = logprobs.gather(-1, inputs["input_ids"][:, 1:][mask][:, None])[:, 0]
            probabilities, information = logprobs.exp(), logprobs.clamp(min=-1e3)  # 0 * inf is NaN
            mean = (probabilities * information).sum(-1)
            excess += float((drawn - mean).sum())
            variance += float(((probabilities * information.square()).sum(-1) - mean.square()).sum())
            gap += float((drawn - sampler[mask]).abs().sum())
            count += len(drawn)
        if not abs(excess) <= MOST_DEVIATIONS * variance**0.5:
            raise AnotherStep(f"sampling: log-probs lie {excess / variance**0.5:.0f} deviations from their expectation")
        if recorded and not gap / count <= AT_MOST[self.model.dtype].metrics:
            raise AnotherStep(f"recorded log-probs: off by {gap / count:.1e} in the mean")

    def check_advantages(self, samples: TrainProblem) -> None:
        """They are those of the rewards, and every group has some that are not 0."""
        rewards = [[even_share(t.token_ids[t.policy_mask]) for t in group] for group in samples.groups]
        truth = group_relative(torch.tensor(rewards, dtype=torch.float64))
        if not (truth.view(len(rewards), -1).abs().sum(1) > 0).all():
            raise AnotherStep("advantages: all rewards of a group are equal")
        error = float((samples.advantages.double().cpu() - truth).abs().max())
        if not error <= 1e-4:
            raise AnotherStep(f"advantages: off by {error:.1e}")

    def check_update(self, samples: TrainProblem, found: Found) -> Errors:
        """The update is that of the plain reference on these samples with these advantages."""
        no_bias = torch.zeros((), device=self.model.device)
        loss, metrics = plain_backward(
            *(self.model, self.reference, samples.groups, samples.advantages), logit_bias=no_bias, beta=BETA
        )
        truth = Found(loss, take_gradients(self.model), metrics)
        errors = errors_of(found, truth)
        for what, error, most in zip(Errors._fields, errors, AT_MOST[self.model.dtype], strict=True):
            if not error <= most:
                raise AnotherStep(f"{what} off by {error:.1e}, allowed {most:.0e}")
        return errors


def _check_turn(trajectory: Trajectory, prompt_ids: Tensor, pixel_values: Tensor, task: OneTurn) -> None:
    before, after = np.split(trajectory.token_ids, [len(prompt_ids)])
    if not np.array_equal(before, prompt_ids):
        raise AnotherStep("prompt: other ids than the processor's")
    if not np.array_equal(trajectory.policy_mask, np.arange(len(trajectory.token_ids)) >= len(prompt_ids)):
        raise AnotherStep("policy mask: it is not the turn behind the prompt")
    if len(after) != task.shape.sampled_tokens:
        raise AnotherStep(f"turn: {len(after)} tokens instead of {task.shape.sampled_tokens}")
    if np.isin(after, task.suppressed).any():
        raise AnotherStep("turn: it holds ids that may not be sampled")
    if len(trajectory.images) != 1 or not torch.allclose(trajectory.images[0].pixel_values, pixel_values):
        raise AnotherStep("image: other pixels than the processor's")


def open_judge(models: Models, task: OneTurn, device: torch.device, dtype: torch.dtype) -> Judge:
    """A judge for ``examine``; it takes as much memory as the plain reference."""
    model, reference = (open_stock(folder, device, dtype) for folder in models)
    processor = open_processor(models.policy, most_pixels=task.shape.most_pixels)
    return Judge(model, reference.requires_grad_(False), processor, task)
