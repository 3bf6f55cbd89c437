"""Who takes part in which benchmark, by name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from arft_fast.kernels import head_impl

from . import peers
from .accuracy import Outcome, Step
from .peers import Logprobs, Loss
from .problem import Problem

OURS, PLAIN, COMPILED = "arft_fast", "PyTorch", "PyTorch, compiled"
LIGER, LIGER_COMPILED, TRL = "Liger", "Liger, compiled", "TRL"
LIGER_TF32 = ("Liger, TF32", "Liger, compiled, TF32")
RECOMPUTE, STASH = "arft_fast, nothing stashed", "arft_fast, all stashed"


@dataclass(frozen=True)
class Side:
    """One contestant; every one whose name begins with ours is ours."""

    name: str
    step: Step
    cuda_only: bool = False
    compiled: bool = False

    @property
    def is_ours(self) -> bool:
        return self.name.startswith(OURS)


def training(loss: Loss) -> Step:
    """Loss and gradients."""

    def step(problem: Problem) -> Outcome:
        value = loss(problem)
        value.backward()
        gradients = {"hidden": problem.hidden.grad, "weight": problem.weight.grad}
        return Outcome(value.detach(), {name: grad for name, grad in gradients.items() if grad is not None})

    return step


def scoring(logprobs: Logprobs) -> Step:
    """Log-probs and entropy, no gradient."""

    def step(problem: Problem) -> Outcome:
        with torch.no_grad():
            values, entropy = logprobs(problem)
        return Outcome(values.mean(), {"logprobs": values, "entropy": entropy})

    return step


def policy_loss_sides(device: torch.device) -> list[Side]:
    """Sides of ``policy_loss``. Those that are ``cuda_only`` are listed on a CPU too, so that a table can name them."""

    def liger(compiled: bool, tf32: bool) -> Step:
        return training(partial(peers.liger_loss_tf32 if tf32 else peers.liger_loss, compiled=compiled))

    sides = [Side(OURS, training(peers.our_loss))]
    if device.type == "cuda" and _native_too(device):
        sides.append(Side(f"{OURS}, native", training(partial(peers.our_loss, impl="native"))))
    return [
        *sides,
        Side(PLAIN, training(peers.loss_on(peers.plain_logprobs))),
        Side(COMPILED, training(peers.compiled_loss), compiled=True),
        Side(LIGER, liger(compiled=False, tf32=False)),
        Side(LIGER_COMPILED, liger(compiled=True, tf32=False), compiled=True),
        Side(LIGER_TF32[0], liger(compiled=False, tf32=True), cuda_only=True),
        Side(LIGER_TF32[1], liger(compiled=True, tf32=True), cuda_only=True, compiled=True),
        Side(TRL, training(peers.loss_on(peers.trl_logprobs))),
        Side("Liger on logits, Triton", training(peers.liger_loss_on_logits), cuda_only=True),
        Side(_scaled_cross_entropy(device), training(peers.loss_on(peers.liger_logprobs)), cuda_only=True),
        Side("verl, Triton", training(peers.loss_on(peers.verl_logprobs)), cuda_only=True),
    ]


def linear_logprob_sides(device: torch.device, *, gradient: bool) -> list[Side]:
    """Sides of ``linear_logprob``, with TRL's loss behind them or for scoring."""

    def step(logprobs: Logprobs) -> Step:
        return training(peers.loss_on(logprobs)) if gradient else scoring(logprobs)

    stashes = [
        Side(RECOMPUTE, step(partial(peers.our_logprobs, stash=0.0))),
        Side(STASH, step(partial(peers.our_logprobs, stash=1.0))),
    ]
    return [
        Side(OURS, step(peers.our_logprobs)),
        *(stashes if gradient else []),
        Side(PLAIN, step(peers.plain_logprobs)),
        Side(TRL, step(peers.trl_logprobs)),
        Side(_scaled_cross_entropy(device), step(peers.liger_logprobs), cuda_only=True),
        Side("verl, Triton", step(peers.verl_logprobs), cuda_only=True),
    ]


def _native_too(device: torch.device) -> bool:
    """Whether the native library runs here beside the default implementation."""
    hidden = torch.empty(0, device=device)
    try:
        return head_impl(hidden, "native") != head_impl(hidden)
    except RuntimeError:  # not built for this device
        return False


def _scaled_cross_entropy(device: torch.device) -> str:
    """With the implementation that Liger picks for this device."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    return f"Liger scaled CE, {'SM90' if hopper else 'chunks'}"
