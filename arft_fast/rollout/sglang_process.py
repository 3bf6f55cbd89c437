"""SGLang inside this process: its front half on our event loop, its scheduler and detokenizer in children of ours.

``sglang.Engine`` drives its own event loop and dies with its process. Here its parts are used one by one:

- Its control methods run the loop themselves and fail inside a running one: their asynchronous halves are awaited.
- Its first request takes over SIGTERM and SIGQUIT of the event loop, and an error while it reads replies kills this
  process: the loop's reader is started by hand.
- A failed child asks for the death of this whole process tree (SIGQUIT), and one that was killed is waited for without
  end: here every waiting call ends with ``EngineDied``.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import aclosing
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor

from arft_fast.policy.images import EncodedImage
from arft_fast.policy.model import Policy
from arft_fast.rollout.engine import EngineBusy, EngineDied, EngineError, WeightUpdateError
from arft_fast.rollout.sglang_backend import SglangRequest
from arft_fast.rollout.sglang_launch import Launched, environment, server_args, start_engine
from arft_fast.rollout.weight_export import buckets, checkpoint_tensors

T = TypeVar("T")

_FLUSH_S = 60.0  # SGLang refuses to flush for a moment behind the last reply; this long means that something runs
_WATCH_S = 0.5


class SglangProcess:
    """An ``SglangBackend``: see there, and the module's text. Made by ``launch``; one event loop for life."""

    def __init__(self, policy: Policy, launched: Launched, *, bucket_bytes: int = 1 << 30) -> None:
        self._policy = policy
        self._launched = launched
        self._manager = launched.engine.tokenizer_manager
        self._bucket_bytes = bucket_bytes
        self._released = False
        self._adapter: str | None = None
        self._closed = False
        self._image_hashes: dict[str, int] = {}
        self._loop = asyncio.get_running_loop()
        self._death: asyncio.Future[str] = self._loop.create_future()
        """Why nothing can be computed any more."""
        if self._manager._subprocess_watchdog is not None:
            self._manager._subprocess_watchdog.stop()  # it watches the children to raise SIGQUIT; ``_watch`` does too
        self._manager.event_loop = self._loop  # SGLang takes its reader as started
        self._reader = asyncio.create_task(self._manager.handle_loop(), name="sglang replies")
        self._reader.add_done_callback(self._reader_ended)
        self._watcher = asyncio.create_task(self._watch(), name="sglang children")
        self._old_handler = signal.signal(signal.SIGQUIT, self._on_sigquit)

    @classmethod
    async def launch(
        cls,
        policy: Policy,
        *,
        slots: int,
        max_tokens: int,
        memory_fraction: float,
        engine_args: Mapping[str, Any],
        trains_vision: bool,
        bucket_bytes: int = 1 << 30,
    ) -> SglangProcess:
        """Start SGLang for ``policy``; blocks the event loop for the half minute and more that it takes.

        Its weights are random until the first ``load_weights``.

        Args:
            slots: sequences decoded together; further requests wait.
            max_tokens: longest sequence, prompt and all turns.
            memory_fraction: share of the GPU's free memory for weights and cache; a CPU gives what ``slots`` need.
            engine_args: SGLang's ``ServerArgs`` by name; they win over what is chosen here.
            trains_vision: features of images change with the weights, so none are kept.
            bucket_bytes: weights are sent in pieces of about this size.

        Raises:
            EngineError: SGLang is not installed, or does not start; or this is not the main thread.
        """
        arguments = server_args(policy, slots=slots, max_tokens=max_tokens, memory_fraction=memory_fraction)
        launched = start_engine(policy, arguments | dict(engine_args), environment(policy, trains_vision))
        return cls(policy, launched, bucket_bytes=bucket_bytes)

    async def generate(self, request: SglangRequest) -> dict[str, Any]:
        """One turn; see ``SglangBackend``."""
        from sglang.srt.managers.io_struct import GenerateReqInput

        # Images are preprocessed already, so SGLang wants every placeholder and re-tokenises nothing.
        order = GenerateReqInput(
            rid=request.rid,
            input_ids=list(request.expanded_ids),
            image_data=self._image_data(request.images),
            sampling_params=dict(request.sampling_params),
            return_logprob=True,
            return_prompt_token_ids=True,
            cache_salt=request.cache_salt,
            lora_path=self._adapter,
        )
        try:
            return await self._while_alive(self._first_reply(order))
        except EngineError:
            raise
        except Exception as error:  # whatever SGLang objects to, ValueError and HTTPException among it
            raise EngineError(f"SGLang refused request {request.rid} ({error})") from error

    async def abort(self, rid: str) -> None:
        """End a request; see ``SglangBackend``."""
        if not self._death.done():
            self._manager.abort_request(rid=rid)

    async def sleep(self) -> None:
        """Give weights and cache back (a CPU has nowhere to give them); see ``SglangBackend``.

        Raises:
            EngineBusy: SGLang is still computing.
            EngineDied: a child is gone.
        """
        from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput

        if refusal := await self._flush():  # a release while anything runs is the scheduler's death
            raise EngineBusy(f"SGLang is still computing {_FLUSH_S:.0f} s behind the last reply ({refusal})")
        await self._while_alive(self._manager.release_memory_occupation(ReleaseMemoryOccupationReqInput()))
        self._released = True

    async def load_weights(self, version: int) -> None:
        """Take the policy's weights and forget the rest; see ``SglangBackend``."""
        await self._resume("weights")
        await self._update(version)
        await self._resume("kv_cache", "cuda_graph")
        self._released = False
        self._image_hashes.clear()
        if refusal := await self._flush():
            raise WeightUpdateError(f"SGLang keeps what version {version - 1} computed ({refusal})")

    async def load_adapter(self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        """Load a LoRA adapter from memory and generate with it from now on.

        ``engine_args`` must hold ``enable_lora`` and ``max_lora_rank``.

        Args:
            tensors: by PEFT's names.
            config: the contents of PEFT's ``adapter_config.json``.

        Raises:
            WeightUpdateError: SGLang refused it.
        """
        from sglang.srt.managers.io_struct import LoadLoRAAdapterFromTensorsReqInput

        order = LoadLoRAAdapterFromTensorsReqInput(
            lora_name=name, config_dict=dict(config), serialized_named_tensors=self._for_each_rank(dict(tensors))
        )
        result = await self._while_alive(self._manager.load_lora_adapter_from_tensors(order))
        if not result.success:
            raise WeightUpdateError(f"SGLang refused adapter {name!r} ({result.error_message})")
        self._adapter = name

    async def unload_adapter(self, name: str) -> None:
        """Forget a LoRA adapter; if it was the one in use, generate without any.

        Raises:
            WeightUpdateError: SGLang refused; it may not know the name.
        """
        from sglang.srt.managers.io_struct import UnloadLoRAAdapterReqInput

        result = await self._while_alive(self._manager.unload_lora_adapter(UnloadLoRAAdapterReqInput(lora_name=name)))
        if not result.success:
            raise WeightUpdateError(f"SGLang did not unload adapter {name!r} ({result.error_message})")
        if self._adapter == name:
            self._adapter = None

    async def close(self) -> None:
        """End SGLang's children and no others; calls that still wait end with ``EngineDied``."""
        if self._closed:
            return
        self._closed = True
        self._die("it was closed")
        self._watcher.cancel()
        self._reader.cancel()
        self._launched.end()  # blocks for a moment, but a cancelled ``close`` leaves no process behind
        signal.signal(signal.SIGQUIT, self._old_handler)
        engine = self._launched.engine
        for socket in (self._manager.recv_from_detokenizer, self._manager.send_to_scheduler, engine.send_to_rpc):
            socket.close(linger=0)  # else what nobody reads any more would keep the interpreter from ending
        await asyncio.gather(self._watcher, self._reader, return_exceptions=True)

    def _image_data(self, images: Sequence[EncodedImage]) -> list[dict[str, Any]] | None:
        """One dict whatever the number of images: SGLang takes preprocessed images in no other form."""
        if not images:
            return None
        data: dict[str, Any] = {
            "format": "processor_output",
            "pixel_values": torch.cat([image.pixel_values for image in images]),
            "image_grid_thw": torch.tensor([image.grid_thw for image in images]),
        }
        if len(images) == 1:
            data["hash"] = self._image_hash(images[0])
        return [data]

    def _image_hash(self, image: EncodedImage) -> int:
        """SGLang's own hash of the pixels, which it would compute for each request: 15 ms for 400,000 pixels.

        It must be that very hash: of several images SGLang takes none from its caller, and a turn that adds an image
        has to find the first one's keys and values again.
        """
        from sglang.srt.managers.mm_utils import hash_feature

        if image.key not in self._image_hashes:
            self._image_hashes[image.key] = hash_feature(image.pixel_values)
        return self._image_hashes[image.key]

    async def _first_reply(self, order: Any) -> dict[str, Any]:
        async with aclosing(self._manager.generate_request(order, None)) as replies:
            async for reply in replies:
                return reply
        raise EngineError(f"SGLang gave no reply to request {order.rid}")

    async def _resume(self, *tags: str) -> None:
        from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqInput

        if self._released:
            order = ResumeMemoryOccupationReqInput(tags=list(tags))
            await self._while_alive(self._manager.resume_memory_occupation(order))

    async def _update(self, version: int) -> None:
        from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput
        from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

        await self._bracket("begin_weight_update", "BeginWeightUpdateReqInput")
        for named in buckets(checkpoint_tensors(self._policy), self._bucket_bytes):
            bucket = FlattenedTensorBucket(named_tensors=named)
            contents = {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}
            order = UpdateWeightsFromTensorReqInput(
                serialized_named_tensors=self._for_each_rank(contents),
                load_format="flattened_bucket",
                flush_cache=False,  # once, behind all of them
                weight_version=str(version),
            )
            await self._agreed("update_weights_from_tensor", self._manager.update_weights_from_tensor(order, None))
        await self._bracket("end_weight_update", "EndWeightUpdateReqInput")

    async def _bracket(self, name: str, order: str) -> None:
        """What an update stands between; releases that do not know it need none."""
        from sglang.srt.managers import io_struct

        if (call := getattr(self._manager, name, None)) is not None:
            await self._agreed(name, call(getattr(io_struct, order)()))

    async def _agreed(self, name: str, call: Coroutine[Any, Any, tuple[bool, str]]) -> None:
        success, message = await self._while_alive(call)
        if not success:
            raise WeightUpdateError(f"SGLang refused {name} ({message}); its weights are of no single version now")

    def _for_each_rank(self, contents: dict[str, Any]) -> list[bytes]:
        """Handles of shared memory, one set for each tensor-parallel rank: a set can be opened once."""
        from sglang.srt.utils import MultiprocessingSerializer

        return [MultiprocessingSerializer.serialize(contents) for _ in range(self._launched.engine.server_args.tp_size)]

    async def _flush(self) -> str:
        """Empty the prefix cache. Why it would not be emptied, or nothing when it was."""
        deadline = time.monotonic() + _FLUSH_S
        while True:
            result = await self._while_alive(self._manager.flush_cache())
            if result.success:
                return ""
            if time.monotonic() > deadline:
                return result.message or "its cache would not be flushed"
            await asyncio.sleep(0.02)

    async def _while_alive(self, work: Coroutine[Any, Any, T]) -> T:
        """``work``'s result, or ``EngineDied`` as soon as nobody is left who could give it."""
        task = asyncio.create_task(work)
        waited: tuple[asyncio.Future[Any], ...] = (task, self._death)
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise EngineDied(f"SGLang is gone: {self._death.result()}")
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    def _die(self, reason: str) -> None:
        if not self._death.done():
            self._death.set_result(reason)

    async def _watch(self) -> None:
        while all(child.is_alive() for child in self._launched.children):
            await asyncio.sleep(_WATCH_S)
        gone = next(child for child in self._launched.children if not child.is_alive())
        self._die(f"its process {gone.pid} ended with exit code {gone.exitcode} (-9: killed, perhaps for memory)")

    def _reader_ended(self, reader: asyncio.Task[None]) -> None:
        if not reader.cancelled():
            self._die(f"its replies can no longer be read ({reader.exception()!r})")

    def _on_sigquit(self, number: int, frame: FrameType | None) -> None:
        """A child asks us to end: it has failed, or its watchdog thinks that it hangs."""
        self._loop.call_soon_threadsafe(self._die, "one of its processes failed; its own words stand above")
