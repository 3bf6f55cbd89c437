"""What the default suite assumes of SGLang, checked on the real one: names, rules, and a server of its own."""

from __future__ import annotations

import asyncio
import base64
import inspect
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import requests
import torch
from PIL import Image

from arft_fast.observe.timeline import Timeline
from arft_fast.policy.images import EncodedImage
from arft_fast.policy.model import Policy
from arft_fast.policy.parallel import Ranks
from arft_fast.rollout import sglang_weights
from arft_fast.rollout.engine import EngineError, Generation, Sampling
from arft_fast.rollout.sglang_engine import SGLangEngine
from arft_fast.rollout.sglang_servers import SglangServers
from arft_fast.rollout.weight_export import buckets, checkpoint_tensors
from tests.fake_sglang import REQUEST_FIELDS, ROUTES, FakeEngine, FakeManager, FakeServer, FakeSglang, FakeUnpickler

pytestmark = pytest.mark.sglang

T = TypeVar("T")
GREEDY = Sampling(max_tokens=6, temperature=0)
ALONE = Ranks(rank=0, world=1, device=torch.device("cpu"))
START_S = 300.0
BODIES = {
    "/generate": "GenerateReqInput",
    "/abort_request": "AbortReq",
    "/pause_generation": "PauseGenerationReqInput",
    "/continue_generation": "ContinueGenerationReqInput",
    "/begin_weight_update": "BeginWeightUpdateReqInput",
    "/end_weight_update": "EndWeightUpdateReqInput",
    "/update_weights_from_tensor": "UpdateWeightsFromTensorReqInput",
    "/update_weights_from_disk": "UpdateWeightFromDiskReqInput",
    "/update_weights_from_distributed": "UpdateWeightsFromDistributedReqInput",
    "/update_weight_version": "UpdateWeightVersionReqInput",
    "/init_weights_update_group": "InitWeightsUpdateGroupReqInput",
    "/destroy_weights_update_group": "DestroyWeightsUpdateGroupReqInput",
}


def fields(name: str) -> set[str]:
    """Of one of SGLang's request classes."""
    from sglang.srt.managers import io_struct

    cls = getattr(io_struct, name)
    return set(getattr(cls, "__struct_fields__", ())) or set(cls.__dataclass_fields__)


def prompt(policy: Policy, *shades: int) -> tuple[list[int], list[EncodedImage]]:
    parts = [{"type": "image"} for _ in shades]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "Which digit is shown?"}]}]
    return policy.chat.prompt(messages, [Image.new("RGB", (84, 84 + shade), (shade, 9, 9)) for shade in shades])


@pytest.fixture(autouse=True)
def the_loop_stays() -> Iterator[None]:
    """Importing SGLang's server makes uvloop the policy of this whole process."""
    policy = asyncio.get_event_loop_policy()
    yield
    asyncio.set_event_loop_policy(policy)


def run(work: Awaitable[T]) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(work, 240)

    return asyncio.run(bounded())


@pytest.mark.parametrize("name", REQUEST_FIELDS)
def test_request_objects_have_the_fields_that_are_set(name: str) -> None:
    assert set(REQUEST_FIELDS[name]) <= fields(name)


def test_the_managers_methods_are_called_as_they_are_defined() -> None:
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    for name, fake in vars(FakeManager).items():
        if name.startswith("_") or not inspect.isfunction(fake):
            continue
        real = getattr(TokenizerManager, name)
        theirs, ours = inspect.signature(real).parameters, inspect.signature(fake).parameters
        assert list(theirs)[: len(ours)] == list(ours), name
        assert inspect.iscoroutinefunction(real) == inspect.iscoroutinefunction(fake), name
        assert inspect.isasyncgenfunction(real) == inspect.isasyncgenfunction(fake), name


def test_the_engine_has_what_is_taken_from_it() -> None:
    from sglang.srt.entrypoints.engine import Engine

    source = inspect.getsource(sys.modules[Engine.__module__])
    assert {name for name in vars(FakeEngine) if not name.startswith("_")} <= set(dir(Engine))
    assert "self.tokenizer_manager" in source and "self.send_to_rpc" in source and "self.server_args" in source


def test_http_routes_take_the_methods_that_are_used() -> None:
    from sglang.srt.entrypoints.http_server import app

    real: dict[str, set[str]] = {}
    for route in app.routes:
        real.setdefault(getattr(route, "path", ""), set()).update(getattr(route, "methods", None) or ())
    assert "/workers" not in real  # a router's alone: how one is told from a server
    for path in ROUTES.keys() - {"/workers"}:
        assert ("GET" if path.endswith("_info") else "POST") in real[path], path


def test_bodies_hold_known_fields_only(policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pydantic would drop an unknown one in silence."""
    with FakeServer(FakeSglang(policy, token_s=0.02)) as server:
        monkeypatch.setattr(sglang_weights, "_join_group", lambda *arguments: server)
        monkeypatch.setattr(sglang_weights, "_broadcast", lambda flat, group: group.core.inbox.put(flat.clone()))
        monkeypatch.setattr(sglang_weights.dist, "destroy_process_group", lambda group: None)

        async def work() -> None:
            for transfer in ("tensor", "disk", "nccl"):
                backend = await SglangServers.connect(
                    policy, [server.url], transfer=transfer, folder=tmp_path, ranks=ALONE, concurrency=1, timeout_s=60
                )
                engine = SGLangEngine(policy, backend, max_tokens=256, timeline=Timeline())
                await engine.load_weights(0)
                call = asyncio.ensure_future(engine.generate(*prompt(policy, 7), Sampling(max_tokens=100)))
                while not server.core.running:
                    await asyncio.sleep(0.01)
                call.cancel()
                await engine.close()

        run(work())
        assert {path for path, body in server.requests if body is not None} == {*BODIES, "/flush_cache"}
        for path, name in BODIES.items():
            for body in server.asked(path):
                assert set(body) <= fields(name), path


def test_sglang_unpickles_the_payload_and_rebuilds_the_tensors(policy: Policy) -> None:
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.utils.common import SafeUnpickler
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    (bucket,) = buckets(checkpoint_tensors(policy), 2**40)
    content = MultiprocessingSerializer.deserialize(base64.b64decode(sglang_weights._payload(bucket)))
    rebuilt = FlattenedTensorBucket(
        flattened_tensor=content["flattened_tensor"], metadata=content["metadata"]
    ).reconstruct_tensors()
    for (name, tensor), (their_name, theirs) in zip(bucket, rebuilt, strict=True):
        assert name == their_name and theirs.dtype == tensor.dtype
        torch.testing.assert_close(theirs, tensor, atol=0, rtol=0)
    strict = FakeUnpickler.allowed - {("torch.storage", "_load_from_bytes")}  # which SGLang replaces by a safe one
    assert strict <= SafeUnpickler.ALLOWED_GLOBALS


@pytest.fixture(scope="module")
def url(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server with the tiny policy. It keeps embeddings of images, which is SGLang's default."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = {
        "model-path": tiny_folder, "host": "127.0.0.1", "port": port, "device": "cpu",
        "attention-backend": "torch_native", "mm-attention-backend": "sdpa", "sampling-backend": "pytorch",
        "dtype": "float32", "max-total-tokens": 4096, "max-running-requests": 8, "context-length": 512,
        "grammar-backend": "none",
    }  # fmt: skip
    command = [sys.executable, "-m", "sglang.launch_server", "--skip-server-warmup", "--disable-cuda-graph"]
    command += ["--disable-overlap-schedule", *(part for k, v in flags.items() for part in (f"--{k}", str(v)))]
    environment = os.environ | {"SGLANG_USE_CPU_ENGINE": "1", "SGLANG_VLM_CACHE_SIZE_MB": "100"}
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        _await_start(server, url, log)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _await_start(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if requests.get(f"{url}/health_generate", timeout=60).status_code == 200:
                return
        except requests.ConnectionError:
            time.sleep(1)
    pytest.fail(f"SGLang's server did not start:\n{log.read_text()[-3000:]}")


def truth(policy: Policy, ids: list[int], images: list[EncodedImage]) -> tuple[list[int], torch.Tensor]:
    """Greedy ids and their log-probs by transformers' own generate."""
    inputs = torch.tensor([ids])
    model: Any = policy.model
    output = model.generate(
        input_ids=inputs, pixel_values=torch.cat([image.pixel_values for image in images]),
        image_grid_thw=torch.tensor([image.grid_thw for image in images]),
        mm_token_type_ids=(inputs == policy.chat.image_token_id).int(), max_new_tokens=GREEDY.max_tokens,
        do_sample=False, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    sampled = output.sequences[0, len(ids) :]
    logprobs = torch.cat(output.logits).add(policy.logit_bias).log_softmax(-1)
    return sampled.tolist(), logprobs.gather(-1, sampled[:, None])[:, 0]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("transfer", ["tensor", "disk", "nccl"])
def test_a_server_generates_with_the_weights_that_it_was_sent(
    policy: Policy, url: str, tmp_path: Path, transfer: Any
) -> None:
    """Greedy ids and log-probs equal transformers', before and after an update, for images that were seen before."""
    prompts = [prompt(policy, 120), prompt(policy, 120, 7)]
    first = {"tensor": 10, "disk": 20, "nccl": 30}[transfer]
    torch.manual_seed(first)

    async def work() -> list[tuple[list[Generation], list[tuple[list[int], torch.Tensor]]]]:
        backend = await SglangServers.connect(
            policy, [url], transfer=transfer, folder=tmp_path, ranks=ALONE, concurrency=8, timeout_s=120
        )
        engine = SGLangEngine(policy, backend, max_tokens=256, timeline=Timeline())
        seen = []
        try:
            for version in (first, first + 1):
                with torch.no_grad():
                    for parameter in policy.model.parameters():
                        parameter.add_(torch.randn_like(parameter), alpha=0.03)
                await engine.load_weights(version)
                generations = [await engine.generate(*p, GREEDY) for p in prompts]
                await engine.sleep()
                seen.append((generations, [truth(policy, *p) for p in prompts]))
            return seen
        finally:
            await engine.close()

    old, new = run(work())
    for generations, truths in (old, new):
        for generation, (ids, logprobs) in zip(generations, truths, strict=True):
            assert generation.token_ids == ids
            torch.testing.assert_close(torch.tensor(generation.logprobs), logprobs, atol=1e-4, rtol=0)
    assert new[0][0].weight_version == first + 1 and new[0][0].cached_tokens == 0
    # Negative control: by the old weights the new log-probs would be others.
    assert (torch.tensor(new[0][0].logprobs) - old[1][0][1]).abs().max() > 1e-2


@pytest.mark.timeout(600)
def test_a_servers_group_shares_its_prompt_and_a_cancelled_call_ends(policy: Policy, url: str) -> None:
    ids, images = prompt(policy, 50)

    async def work() -> list[Generation]:
        backend = await SglangServers.connect(
            policy, [url], transfer="tensor", folder=None, ranks=ALONE, concurrency=8, timeout_s=120
        )
        engine = SGLangEngine(policy, backend, max_tokens=4000, timeline=Timeline())
        try:
            await engine.load_weights(40)
            generations = await asyncio.gather(
                *(engine.generate(ids, images, Sampling(max_tokens=4), group="g") for _ in range(8))
            )
            call = asyncio.ensure_future(engine.generate(ids, images, Sampling(max_tokens=400)))
            await asyncio.sleep(1)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            await engine.load_weights(41)
            assert requests.get(f"{url}/model_info", timeout=60).json()["weight_version"] == "41"
            with pytest.raises(EngineError, match="context length"):  # the server's own words
                await engine.generate(ids * 16, images * 16, Sampling(max_tokens=100))
            return generations
        finally:
            await engine.close()

    generations = run(work())
    assert sum(g.prefilled_tokens for g in generations) == len(ids) + 8
