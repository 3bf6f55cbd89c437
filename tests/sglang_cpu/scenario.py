"""One life of the engine on the real SGLang, in a process of its own; what was seen goes to a JSON file.

``python -m tests.sglang_cpu.scenario FILE``. SGLang takes half a minute to start, and its death is among the things to
see, so that one process does everything once; ``test_sglang_engine`` says what the figures have to be. A step that
raises leaves its traceback in place of its figures.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from arft_fast.observe.timeline import Timeline
from arft_fast.policy.batch import collate
from arft_fast.policy.forward import score
from arft_fast.policy.model import Policy, load_policy
from arft_fast.policy.tiny import build_tiny
from arft_fast.protocol import STOP_TAGS
from arft_fast.rollout.engine import (
    EngineBusy,
    EngineDied,
    EngineError,
    Generation,
    PromptMismatch,
    Sampling,
    WeightUpdateError,
)
from arft_fast.rollout.sglang_backend import SglangRequest
from arft_fast.rollout.sglang_engine import SGLangEngine
from arft_fast.rollout.sglang_process import SglangProcess
from tests.sglang_cpu.bench import MAX_TOKENS, Bench, changed, distance, episode

TEXTS = [
    "Which colour is the shape in the picture?",
    "<search> a cat </search> <answer> red </answer> it was seen",
] * 20
LONG = Sampling(max_tokens=180, temperature=0)  # seconds; greedy, as a sampled turn may be short
# As torchrun describes a process; nobody listens there.
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "LOCAL_RANK": "0"}


async def greedy_ids(bench: Bench) -> dict[str, Any]:
    prompts = {"text": bench.prompt("Which colour is it?"), "image": bench.prompt("Which colour is it?", 40)}
    found = {name: (await bench.greedy(*prompt)).token_ids for name, prompt in prompts.items()}
    return {"found": found, "expected": {name: bench.expected(*prompt) for name, prompt in prompts.items()}}


async def logprobs(bench: Bench) -> dict[str, Any]:
    """Several samplings at a time in one batch: greedy, tempered and truncated rows side by side."""
    cases = {
        "greedy": Sampling(max_tokens=8, temperature=0),
        "sampled": Sampling(max_tokens=8),
        "tempered": Sampling(max_tokens=8, temperature=0.7),
        "truncated": Sampling(max_tokens=8, top_k=5, top_p=0.8),
    }
    played = await asyncio.gather(*(episode(bench, 30 + 5 * k, case) for k, case in enumerate(cases.values())))
    distances = {
        name: distance(bench, [trajectory], case.temperature or 1.0)
        for (name, case), (trajectory, _) in zip(cases.items(), played, strict=True)
    }
    without_ban = replace(bench.policy, logit_bias=torch.zeros_like(bench.policy.logit_bias))
    unbanned = score(without_ban, collate(bench.policy, [played[1][0]]))
    recorded = torch.from_numpy(played[1][0].logprobs[played[1][0].policy_mask])
    return {"distances": distances, "without_ban": (unbanned - recorded).abs().max().item()}


async def later_turns(bench: Bench) -> list[dict[str, int]]:
    _, generations = await episode(bench, 222, Sampling(max_tokens=8))
    return [
        {"cached": g.cached_tokens, "prefilled": g.prefilled_tokens, "sampled": len(g.token_ids)} for g in generations
    ]


async def group(bench: Bench) -> dict[str, Any]:
    """Eight samples of a prompt whose first token was never seen, as a group; then of another, each for itself."""
    end, images = bench.prompt("Which of the shapes is the odd one out, and why?", 99)

    async def eight(first: str, group: str) -> list[Generation]:
        ids = bench.policy.chat.plain(first) + end
        calls = (bench.engine.generate(ids, images, Sampling(max_tokens=6), group=group) for _ in range(8))
        return await asyncio.gather(*calls)

    bench.timeline.take()
    generations = await eight("Q", "odd one")
    spans = bench.timeline.take()
    bench.to_scheduler(signal.SIGSTOP)  # so that they reach it together
    alone = asyncio.create_task(eight("Z", ""))
    await asyncio.sleep(1)
    bench.to_scheduler(signal.SIGCONT)
    return {
        "prompt": len(end) + 1,
        "prefilled": [g.prefilled_tokens for g in generations],
        "alone": [g.prefilled_tokens for g in await alone],
        "texts": len({tuple(g.token_ids) for g in generations}),
        "spans": [(span.kind, span.track, span.seconds) for span in spans],
    }


async def stops(bench: Bench) -> dict[str, Any]:
    """A stop inside the text of a token that the policy will certainly sample, and the token that ends a turn."""
    ids, images = bench.prompt("Which colour is it?")
    free = (await bench.greedy(ids, images)).token_ids
    text = bench.policy.tokenizer.decode(free[:1])
    stopped = await bench.engine.generate(
        ids, images, Sampling(max_tokens=10, temperature=0, stop=(text[0], *STOP_TAGS))
    )
    raw = bench.policy.tokenizer.encode("it was seen", add_special_tokens=False)  # holds no end of a turn itself
    inputs = torch.tensor([raw])
    hidden = bench.policy.model(inputs, output_hidden_states=True).hidden_states[-1][0, -1].detach()
    end = bench.policy.chat.end_of_turn_id
    with changed(bench.policy.head.weight, end, hidden * 9):
        await bench.refresh(1)
        ended = await bench.greedy(raw, [])
    await bench.refresh(2)
    return {
        "free": free, "stopped": stopped.token_ids, "finish": [stopped.finish, ended.finish], "ended": ended.token_ids,
        "end": end,
    }  # fmt: skip


async def vision_ids(bench: Bench) -> dict[str, Any]:
    """A policy that wants to write <|video_pad|>: with the ban, and without it as a control."""
    banned = torch.isneginf(bench.policy.logit_bias).nonzero().flatten().tolist()
    video = bench.policy.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    weight = bench.policy.head.weight
    prompts = [bench.prompt(f"Colour {k}?", 10 * k) for k in range(4)]
    with changed(weight, video, weight.data[video] * 200):
        await bench.refresh(3)
        calls = (bench.engine.generate(*prompt, Sampling(max_tokens=12)) for prompt in prompts)
        held = await asyncio.gather(*calls)
        played, _ = await episode(bench, 60, Sampling(max_tokens=8))
        seen = distance(bench, [played], 1.0)
        free: list[list[int]] = []
        for ids, images in prompts:
            request = SglangRequest(
                rid=f"free {len(free)}", input_ids=ids, expanded_ids=ids, images=images, group="", cache_salt="v3",
                sampling_params={"max_new_tokens": 12},
            )  # fmt: skip
            free.append((await bench.backend.generate(request))["output_ids"])
    await bench.refresh(4)
    return {"banned": banned, "held": [g.token_ids for g in held], "free": free, "distance": seen}


async def new_weights(bench: Bench) -> dict[str, Any]:
    """Every weight changes, the vision tower's too; one picture was seen before, one was not."""
    seen, fresh = bench.prompt("Which colour is it?", 40), bench.prompt("Which colour is it?", 140)
    before = await bench.greedy(*seen)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in bench.policy.model.parameters():
            parameter.add_(0.3 * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator))
    await bench.refresh(5)
    after = [await bench.greedy(*seen), await bench.greedy(*fresh)]
    played, _ = await episode(bench, 60, Sampling(max_tokens=8))
    return {
        "before": before.token_ids,
        "after": [g.token_ids for g in after],
        "expected": [bench.expected(*seen), bench.expected(*fresh)],
        "cached": after[0].cached_tokens,
        "versions": [before.weight_version, after[0].weight_version],
        "distance": distance(bench, [played], 1.0),
    }


async def mismatch(bench: Bench) -> str:
    """A backend between that sends another id than it was given."""

    class Garbling:
        def __init__(self, inner: SglangProcess) -> None:
            self.sleep, self.load_weights, self.abort = inner.sleep, inner.load_weights, inner.abort
            self.close, self._inner = inner.close, inner

        async def generate(self, request: SglangRequest) -> dict[str, Any]:
            return await self._inner.generate(replace(request, expanded_ids=[*request.expanded_ids[:-1], 7]))

    engine = SGLangEngine(bench.policy, Garbling(bench.backend), max_tokens=MAX_TOKENS, timeline=Timeline())
    await engine.load_weights(6)
    return await _raised(PromptMismatch, engine.generate(*bench.prompt("Colour?"), Sampling(max_tokens=2)))


async def refused(bench: Bench) -> dict[str, str]:
    """SGLang's own objections: to a parameter, and to an adapter of an engine without ``enable_lora``."""
    ids, images = bench.prompt("Colour?")
    request = SglangRequest(
        rid="same",
        input_ids=ids,
        expanded_ids=ids,
        images=images,
        group="",
        cache_salt="",
        sampling_params={"top_p": 7},
    )
    return {
        "request": await _raised(EngineError, bench.backend.generate(request)),
        "adapter": await _raised(WeightUpdateError, bench.backend.load_adapter("a", {"x": torch.zeros(1)}, {})),
    }


async def cancelled(bench: Bench) -> dict[str, Any]:
    """A long turn is cancelled; while it ran, sleep refused, and behind it sleep finds nothing left."""
    ids, images = bench.prompt("Tell me more.", 77)
    task = asyncio.create_task(bench.engine.generate(ids, images, LONG, group="cancelled"))
    await asyncio.sleep(0.3)
    busy = await _raised(EngineBusy, bench.engine.sleep())
    finished = task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    follower = await bench.engine.generate(ids, images, Sampling(max_tokens=2), group="cancelled")
    await bench.refresh(7)
    left = list(bench.backend._manager.rid_to_state)
    return {"busy": busy, "finished": finished, "follower": len(follower.token_ids), "left": left}


async def death(bench: Bench) -> dict[str, Any]:
    """The last step: a child of SGLang is killed in the middle of a turn; one of ours sleeps on."""
    sleeper = subprocess.Popen(["sleep", "600"])
    children = {child.pid for child in multiprocessing.active_children()}
    ids, images = bench.prompt("Tell me more.", 77)
    calls = [asyncio.create_task(bench.engine.generate(ids, images, LONG)) for _ in range(3)]
    await asyncio.sleep(0.3)
    assert not any(call.done() for call in calls)
    bench.to_scheduler(signal.SIGKILL)
    start = time.monotonic()
    words = [await _raised(EngineDied, asyncio.wait_for(call, 60)) for call in calls]
    heard_s = time.monotonic() - start
    later = await _raised(EngineDied, bench.engine.load_weights(8))
    start = time.monotonic()
    await bench.engine.close()
    closed_s = time.monotonic() - start
    after = await _raised(EngineDied, bench.engine.generate(ids, images, Sampling(max_tokens=2)))
    alive = sleeper.poll() is None
    sleeper.terminate()
    sleeper.wait()
    return {
        "words": words, "later": later, "after": after, "heard_s": heard_s, "closed_s": closed_s, "sleeper": alive,
        "orphans": [pid for pid in children if pid is not None and Path("/proc", str(pid)).exists()],
    }  # fmt: skip


async def _raised(kind: type[Exception], work: Awaitable[Any]) -> str:
    """The words of the error that has to come."""
    try:
        result = await work
    except kind as error:
        return str(error)
    raise AssertionError(f"{kind.__name__} was expected, {result!r} came")


STEPS: tuple[Callable[[Bench], Awaitable[Any]], ...] = (
    greedy_ids, logprobs, later_turns, group, stops, vision_ids, new_weights, mismatch, refused, cancelled, death,
)  # fmt: skip


def _surroundings() -> dict[str, str]:
    """What SGLang's launch would change for the whole process."""
    handlers = {number.name: str(signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGQUIT)}
    policy = type(asyncio.get_event_loop_policy()).__name__
    return {**os.environ, **handlers, "policy": policy, "start": str(multiprocessing.get_start_method(allow_none=True))}


async def live(policy: Policy) -> dict[str, Any]:
    facts: dict[str, Any] = {"seconds": {}}
    options: dict[str, Any] = {"slots": 8, "max_tokens": MAX_TOKENS, "memory_fraction": 0.5, "trains_vision": True}
    facts["unknown"] = await _raised(EngineError, SglangProcess.launch(policy, engine_args={"no_such": 1}, **options))
    before, start = _surroundings(), time.monotonic()
    backend = await SglangProcess.launch(policy, engine_args={}, bucket_bytes=1 << 20, **options)
    facts["seconds"]["launch"] = time.monotonic() - start
    bench = Bench(policy, backend)
    try:
        facts["early"] = await _raised(EngineError, bench.greedy(*bench.prompt("Colour?")))
        await bench.engine.load_weights(0)
        for step in STEPS:
            start = time.monotonic()
            try:
                facts[step.__name__] = await step(bench)
            except Exception:
                facts[step.__name__] = {"raised": traceback.format_exc()}
            facts["seconds"][step.__name__] = time.monotonic() - start
            print(f"{step.__name__} {facts['seconds'][step.__name__]:.1f} s", flush=True)
    finally:
        await bench.engine.close()
    after = _surroundings()
    facts["surroundings"] = {key: [before.get(key), after.get(key)] for key in {*before, *after}}
    return facts


def main(output: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(TORCHRUN, TORCHELASTIC_USE_AGENT_STORE="True")
    with tempfile.TemporaryDirectory() as folder:
        build_tiny(Path(folder), TEXTS, seed=0)
        policy = load_policy(folder, device=torch.device("cpu"), dtype=torch.float32)
    output.write_text(json.dumps(asyncio.run(live(policy))))


if __name__ == "__main__":  # SGLang's processes import this file too
    main(Path(sys.argv[1]))
