"""What the tests of the SGLang engine share: prompts, their truth, and an engine around the fake, here or at URLs."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from PIL import Image

from arft_fast.observe.timeline import Timeline
from arft_fast.policy.images import EncodedImage
from arft_fast.policy.model import Policy
from arft_fast.policy.parallel import Ranks
from arft_fast.rollout import sglang_process
from arft_fast.rollout.engine import Generation, Sampling
from arft_fast.rollout.sglang_engine import SGLangEngine
from arft_fast.rollout.sglang_launch import Launched
from arft_fast.rollout.sglang_process import SglangProcess
from arft_fast.rollout.sglang_servers import SglangServers
from arft_fast.rollout.sglang_weights import Transfer
from tests.fake_sglang import FakeChild, FakeEngine, FakeServer, FakeSglang, install

T = TypeVar("T")
Prompt = tuple[list[int], list[EncodedImage]]
Work = Callable[[SGLangEngine], Awaitable[T]]
Serve = Callable[..., FakeServer]

ALONE = Ranks(rank=0, world=1, device=torch.device("cpu"))
GREEDY = Sampling(max_tokens=4, temperature=0)


def prompt(policy: Policy, shade: int | None = 120, text: str = "Which digit is shown?") -> Prompt:
    part = [] if shade is None else [{"type": "image"}]
    messages = [{"role": "user", "content": [*part, {"type": "text", "text": text}]}]
    return policy.chat.prompt(messages, [] if shade is None else [Image.new("RGB", (84, 84), (shade, 9, 9))])


def truth(policy: Policy, ids: Sequence[int], images: Sequence[EncodedImage]) -> tuple[list[int], list[float]]:
    """What ``GREEDY`` has to give, by transformers' own generate: ids and their log-probs."""
    inputs = {"input_ids": torch.tensor([ids])}
    if images:
        inputs["pixel_values"] = torch.cat([image.pixel_values for image in images])
        inputs["image_grid_thw"] = torch.tensor([image.grid_thw for image in images])
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == policy.chat.image_token_id).int()
    model: Any = policy.model
    output = model.generate(
        **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    logprobs = [torch.log_softmax(row[0] + policy.logit_bias, -1) for row in output.logits]
    sampled = output.sequences[0, len(ids) :].tolist()
    return sampled, [float(row[token]) for row, token in zip(logprobs, sampled, strict=True)]


def change(policy: Policy) -> None:
    """Other weights everywhere, vision tower included."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.03)


def run(work: Awaitable[T]) -> T:
    """Nothing here may hang."""

    async def bounded() -> T:
        return await asyncio.wait_for(work, 30)

    return asyncio.run(bounded())


async def several(calls: Sequence[Awaitable[Generation]]) -> list[Generation | BaseException]:
    return await asyncio.gather(*calls, return_exceptions=True)


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def importable(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> FakeSglang:
    """A fake SGLang with the policy's weights of now, importable as ``sglang``."""
    core = FakeSglang(policy, vision_cache=False)
    install(monkeypatch, core)
    monkeypatch.setattr(sglang_process, "_WATCH_S", 0.02)
    return core


def in_process(policy: Policy, core: FakeSglang, work: Work[T], timeline: Timeline | None = None) -> T:
    """``work`` on an engine inside this process, with weights of version 0; nothing here may hang."""

    async def bounded() -> T:
        launched = Launched(engine=FakeEngine(core), children=[FakeChild(core)], folder=tempfile.TemporaryDirectory())
        backend = SglangProcess(policy, launched, bucket_bytes=2**20)
        engine = SGLangEngine(policy, backend, max_tokens=256, timeline=timeline or Timeline())
        try:
            await engine.load_weights(0)
            return await asyncio.wait_for(work(engine), 30)
        finally:
            await asyncio.wait_for(engine.close(), 10)

    return asyncio.run(bounded())


@contextmanager
def serving(policy: Policy) -> Iterator[Serve]:
    """Starts fake servers that hold the policy's weights of now."""
    with ExitStack() as stack:

        def start(core: FakeSglang | None = None, **options: Any) -> FakeServer:
            return stack.enter_context(FakeServer(core or FakeSglang(policy), **options))

        yield start


@asynccontextmanager
async def connected(
    policy: Policy,
    *servers: FakeServer,
    transfer: Transfer = "tensor",
    folder: Path | None = None,
    timeout_s: float = 10.0,
    ranks: Any = ALONE,
) -> AsyncIterator[SGLangEngine]:
    """An engine at the servers' URLs, without weights yet."""
    backend = await SglangServers.connect(
        policy, [s.url for s in servers], transfer=transfer, folder=folder, ranks=ranks, concurrency=16,
        timeout_s=timeout_s,
    )  # fmt: skip
    engine = SGLangEngine(policy, backend, max_tokens=256, timeline=Timeline())
    try:
        yield engine
    finally:
        await asyncio.wait_for(engine.close(), 10)
