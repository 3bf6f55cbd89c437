from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from arft_fast.kernels import policy_loss
from arft_fast.policy.batch import collate
from arft_fast.policy.forward import hidden_rows
from arft_fast.policy.model import Policy
from arft_fast.rollout.ledger import Ledger
from arft_fast.trajectory import Ending, Prompt, Trajectory

# One piece of an episode: sampled ids, tool text, or tool text with an image.
PIECES = st.lists(
    st.tuples(st.sampled_from(["sampled", "text", "image"]), st.lists(st.integers(0, 255), min_size=1, max_size=6)),
    min_size=1,
    max_size=6,
)


def _trajectory(policy: Policy, pieces: list[tuple[str, list[int]]]) -> Trajectory:
    ledger = Ledger(image_token_id=policy.chat.image_token_id, max_tokens=500)
    ledger.add_context([1, 2, 3])
    for kind, ids in pieces:
        if kind == "sampled":
            ledger.add_sampled(ids, [-1.0] * len(ids))
        else:
            images = [policy.images.encode(Image.new("RGB", (56, 56), (ids[0], 0, 0)))] if kind == "image" else []
            ledger.add_context([*ids, *[policy.chat.image_token_id] * sum(image.tokens for image in images)], images)
    token_ids, mask, logprobs = ledger.arrays()
    prompt = Prompt(uid="p", task="t", messages=[])
    return Trajectory(
        prompt=prompt, sample=0, token_ids=token_ids, policy_mask=mask, logprobs=logprobs, images=ledger.images,
        turns=[], ending=Ending.ANSWER,
    )  # fmt: skip


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(episodes=st.lists(PIECES, min_size=1, max_size=3))
def test_the_loss_touches_exactly_the_rows_before_sampled_ids(policy: Policy, episodes: list[Any]) -> None:
    trajectories = [_trajectory(policy, pieces) for pieces in episodes]
    if not any(t.completion_length for t in trajectories):
        return
    batch = collate(policy, trajectories)
    seen: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        output.last_hidden_state.retain_grad()
        seen.append(output.last_hidden_state)

    hook = policy.model.model.language_model.register_forward_hook(keep)
    loss, _ = policy_loss(
        hidden_rows(policy, batch), policy.head.weight, batch.targets, torch.ones(len(trajectories)),
        cu_seqlens=batch.cu_seqlens, bias=policy.logit_bias,
    )  # fmt: skip
    loss.backward()
    hook.remove()
    touched = seen[0].grad.abs().sum(-1) > 0
    for row, trajectory in enumerate(trajectories):
        expected = np.zeros(touched.shape[1], dtype=bool)
        expected[np.flatnonzero(trajectory.policy_mask) - 1] = True
        assert touched[row].tolist() == expected.tolist()
    expected_ids = np.concatenate([t.token_ids[t.policy_mask] for t in trajectories])
    assert batch.targets.tolist() == expected_ids.tolist()


def test_an_image_enters_with_its_placeholders_or_not_at_all(policy: Policy) -> None:
    image = policy.images.encode(Image.new("RGB", (56, 56)))
    pads = [policy.chat.image_token_id] * image.tokens
    ledger = Ledger(image_token_id=policy.chat.image_token_id, max_tokens=image.tokens + 2)
    with pytest.raises(ValueError, match="placeholders"):
        ledger.add_context(pads[:-1], [image])
    assert ledger.add_context([5, *pads], [image])
    assert not ledger.add_context([5, 6])
    assert (len(ledger), len(ledger.images)) == (image.tokens + 1, 1)


def test_a_context_that_does_not_fit_leaves_no_image_behind(policy: Policy) -> None:
    image = policy.images.encode(Image.new("RGB", (56, 56)))
    ledger = Ledger(image_token_id=policy.chat.image_token_id, max_tokens=2)
    assert not ledger.add_context([policy.chat.image_token_id] * image.tokens, [image])
    assert (len(ledger), ledger.images) == (0, [])
