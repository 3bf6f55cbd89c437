"""Whether a prefix tree is exact for a model: read from its configuration, and tried on a first batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from arft_fast.kernels import linear_logprob
from arft_fast.policy.attention import NAME
from arft_fast.policy.batch import Batch, collate, collate_tree, tree_paths
from arft_fast.policy.forward import hidden_rows
from arft_fast.policy.model import Policy
from arft_fast.trajectory import Trajectory

_WINDOWED = ("sliding_attention", "chunked_attention")


def obstacle(model: PreTrainedModel, longest: int) -> str | None:
    """Why paths of up to ``longest`` tokens of this model must not share rows; None when they may.

    A row of a tree stands for its token in every path through it. That holds where a row's value depends on its
    ancestors alone, by attention to all of them, and is the same whenever it is computed.
    """
    config = model.config.get_text_config()
    if config._attn_implementation != NAME:
        return f"its text layers use {config._attn_implementation!r} attention, which takes no tree"
    layers = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    if layers.intersection(_WINDOWED) and (window is None or window < longest):
        return f"its layers see a window of {window} tokens, and a path has {longest}"
    if others := sorted(layers.difference(("full_attention", *_WINDOWED))):
        return f"it has layers of type {', '.join(others)}, which read tokens one after the other"
    if getattr(config, "use_bidirectional_attention", None):
        return "its image tokens look ahead"
    if model.training and (dropout := _dropout(model)):
        return f"it has a dropout of {dropout:g}, which differs between samples"
    return None


def _dropout(model: PreTrainedModel) -> float:
    """The largest dropout probability anywhere in the model (attention, residuals, adapters)."""
    config = model.config.get_text_config()
    modules = [float(m.p) for m in model.modules() if isinstance(m, nn.Dropout)]
    return max([float(getattr(config, "attention_dropout", 0.0) or 0.0), *modules])


class TreeMismatch(RuntimeError):
    """The tree does not compute what the sequences one by one do."""


@dataclass(frozen=True, kw_only=True)
class TreeCheck:
    """How far the tree is from the trajectories one by one."""

    logprob_gap: float
    """Largest absolute difference of a log-prob, nats."""
    gradient_gap: float
    """Norm of the difference of the gradients over their norm."""
    gradient_cosine: float


# Both sides round each sum in another order; a wrong mask or position is off by 0.1 and more (tests/test_tree_guard).
_LIMITS = {torch.float64: (1e-6, 1e-6), torch.float32: (1e-3, 1e-3), torch.bfloat16: (0.5, 0.15)}


def check_tree(policy: Policy, trajectories: Sequence[Trajectory], *, temperature: float = 1.0) -> TreeCheck:
    """Compare log-probs and gradient of the tree of ``trajectories`` with those of each trajectory by itself.

    The gradient is that of a sum of log-probs with signs drawn at random, with respect to every trainable parameter;
    it is held twice on the CPU for the comparison. No gradient is left behind.

    Raises:
        TreeMismatch: they differ by more than rounding.
    """
    tree = [collate_tree(policy, trajectories, tree_paths(policy, trajectories))]
    singles = (collate(policy, [trajectory]) for trajectory in trajectories)
    logprobs, gradient = _evaluate(policy, tree, temperature)
    expected_logprobs, expected = _evaluate(policy, singles, temperature)
    inner = sum(float((a.double() * b.double()).sum()) for a, b in zip(gradient, expected, strict=True))
    squares = sum(float(a.double().square().sum()) for a in gradient)
    expected_squares = sum(float(b.double().square().sum()) for b in expected)
    gap = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(gradient, expected, strict=True))
    check = TreeCheck(
        logprob_gap=float((logprobs - expected_logprobs).abs().max()),
        gradient_gap=(gap / expected_squares) ** 0.5 if expected_squares else gap**0.5,
        gradient_cosine=inner / (squares * expected_squares) ** 0.5 if squares * expected_squares else 1.0,
    )
    allowed = _LIMITS.get(policy.model.dtype, _LIMITS[torch.bfloat16])
    # Written so that a NaN fails.
    if not (check.logprob_gap <= allowed[0] and check.gradient_gap <= allowed[1]):
        raise TreeMismatch(
            f"the prefix tree does not compute what the trajectories one by one do: log-probs differ by up to "
            f"{check.logprob_gap:.2g} nats (allowed {allowed[0]:g}), the gradient by {check.gradient_gap:.2g} of its "
            f"norm (allowed {allowed[1]:g}), cosine {check.gradient_cosine:.6f}; set train.prefix_tree = false to "
            "train without it, and please report the model"
        )
    return check


def _evaluate(policy: Policy, batches: Iterable[Batch], temperature: float) -> tuple[Tensor, list[Tensor]]:
    """Log-probs [N] and the gradient of their signed sum, one tensor a trainable parameter; both on the CPU."""
    generator = torch.Generator().manual_seed(0)
    parameters = policy.trainable_parameters()
    found = []
    for batch in batches:
        rows, _ = linear_logprob(
            hidden_rows(policy, batch), policy.head.weight, batch.targets, bias=policy.logit_bias,
            temperature=temperature,
        )  # fmt: skip
        logprobs = batch.per_token(rows)
        signs = torch.randint(2, logprobs.shape, generator=generator) * 2 - 1
        (logprobs * signs.to(logprobs)).sum().backward()
        found.append(logprobs.detach().cpu())
    gradient = [torch.zeros(1) if p.grad is None else p.grad.cpu() for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return torch.cat(found), gradient
