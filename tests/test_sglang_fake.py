"""The fake itself: it would prove little if it were kinder than SGLang."""

from __future__ import annotations

import asyncio

import pytest
import torch

from arft_fast.policy.model import Policy
from tests.fake_sglang import FakeEngine, FakeSglang, SchedulerDied, shallow
from tests.sglang_support import prompt


@pytest.fixture
def policy(policy: Policy) -> Policy:
    return shallow(policy)


@pytest.fixture
def core(policy: Policy) -> FakeSglang:
    return FakeSglang(policy)


def test_the_fake_refuses_tensors_outside_a_session(core: FakeSglang) -> None:
    success, message = core.control("update_weights_from_tensor", [b""], "flattened_bucket")
    assert not success and "between begin_weight_update() and end_weight_update()" in message


def test_the_fake_dies_of_a_release_while_it_is_busy(policy: Policy, core: FakeSglang) -> None:
    order = {"rid": "r", "input_ids": prompt(policy, None)[0], "sampling_params": {"max_new_tokens": 4}}
    next(core.generate(order))
    running = core.generate({**order, "rid": "s"})
    next(running)
    with pytest.raises(SchedulerDied):
        core.control("release_memory_occupation")
    assert core.dead


def test_the_fake_flushes_only_when_it_has_settled(policy: Policy, core: FakeSglang) -> None:
    order = {"rid": "r", "input_ids": prompt(policy, None)[0], "sampling_params": {"max_new_tokens": 1}}
    list(core.generate(order))
    assert [core.control("flush_cache")[0] for _ in range(2)] == [False, True]


def test_the_fakes_synchronous_methods_raise_inside_a_running_loop(core: FakeSglang) -> None:
    async def work() -> None:
        with pytest.raises(RuntimeError, match="running"):
            FakeEngine(core).flush_cache()

    asyncio.run(work())


def test_the_fake_retokenises_a_prompt_whose_placeholders_it_miscounts(policy: Policy, core: FakeSglang) -> None:
    ids = [*prompt(policy, None)[0], policy.chat.image_token_id]
    letters = [policy.tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "answer"]
    order = {"rid": "r", "input_ids": ids + letters, "sampling_params": {"max_new_tokens": 0}}
    *_, reply = core.generate({**order, "return_prompt_token_ids": True})
    assert reply is not None and reply["prompt_token_ids"] != ids + letters


def test_the_fake_keeps_embeddings_of_a_known_image_name(policy: Policy) -> None:
    """What the names by weight version in ``sglang_servers`` are there for."""
    core = FakeSglang(policy, vision_cache=True)
    image = prompt(policy)[1][0]
    old = core.model.image_features(image, "name").clone()
    with torch.no_grad():
        core.model.policy.model.model.visual.patch_embed.proj.weight.mul_(2)
    torch.testing.assert_close(core.model.image_features(image, "name"), old, atol=0, rtol=0)
    assert (core.model.image_features(image, "other name") - old).abs().max() > 1e-3
