"""The fake inside this process: the attributes of ``sglang.Engine`` and the modules that ``sglang_process`` imports."""

from __future__ import annotations

import asyncio
import pickle
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import field, make_dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from .core import FakeSglang, SchedulerDied
from .model import hash_feature


class FakeChild:
    """The scheduler's process, as ``multiprocessing`` shows it."""

    pid, exitcode = 2**22 + 1, None  # above the kernel's largest

    def __init__(self, core: FakeSglang) -> None:
        self._core = core

    def is_alive(self) -> bool:
        return not self._core.dead

    def join(self, timeout: float | None = None) -> None:
        """It ends when it is killed."""


class FakeEngine:
    """The core behind the attributes of ``sglang.Engine``: the awaitable ones of its manager, and one that raises."""

    def __init__(self, core: FakeSglang) -> None:
        nothing = SimpleNamespace(close=lambda linger: None, stop=lambda: None)
        self.tokenizer_manager = FakeManager(core, nothing)
        self.send_to_rpc = nothing
        self.server_args = SimpleNamespace(tp_size=core.tp_size)

    def shutdown(self) -> None:
        raise AssertionError("kills every child of this process, those that are not SGLang's too")

    def flush_cache(self) -> Any:
        call = self.tokenizer_manager.flush_cache()
        try:
            return asyncio.get_event_loop().run_until_complete(call)
        finally:
            call.close()


class FakeManager:
    """``TokenizerManager``: what is awaited of a dead scheduler never ends."""

    def __init__(self, core: FakeSglang, nothing: Any) -> None:
        self._core = core
        self.event_loop: Any = None
        self._subprocess_watchdog = nothing
        self.recv_from_detokenizer = self.send_to_scheduler = nothing

    async def handle_loop(self) -> None:
        await asyncio.Event().wait()

    async def generate_request(self, obj: Any, request: Any = None) -> AsyncIterator[dict[str, Any]]:
        steps = self._core.generate(vars(obj))
        try:
            while (reply := next(steps)) is None:
                await self._alive()
                await asyncio.sleep(self._core.token_s)
        except GeneratorExit:
            self._core.abort(obj.rid)
            raise
        finally:
            steps.close()
        yield reply

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        self._core.abort(rid, abort_all)

    async def _alive(self) -> None:
        if self._core.dead:
            await asyncio.Event().wait()

    async def _control(self, method: str, *arguments: Any, **named: Any) -> tuple[bool, str]:
        await asyncio.sleep(0)
        try:
            return self._core.control(method, *arguments, **named)
        except SchedulerDied:
            await asyncio.Event().wait()
            raise

    async def begin_weight_update(self, obj: Any, request: Any = None) -> tuple[bool, str]:
        return await self._control("begin_weight_update")

    async def end_weight_update(self, obj: Any, request: Any = None) -> tuple[bool, str]:
        return await self._control("end_weight_update")

    async def update_weights_from_tensor(self, obj: Any, request: Any = None) -> tuple[bool, str]:
        reply = await self._control("update_weights_from_tensor", obj.serialized_named_tensors, obj.load_format)
        if reply[0] and obj.weight_version is not None:
            self._core.weight_version = obj.weight_version
        return reply

    async def flush_cache(self, timeout_s: float | None = None) -> Any:
        success, message = await self._control("flush_cache")
        return SimpleNamespace(success=success, message=message)

    async def release_memory_occupation(self, obj: Any, request: Any = None) -> None:
        await self._control("release_memory_occupation")

    async def resume_memory_occupation(self, obj: Any, request: Any = None) -> None:
        await self._control("resume_memory_occupation", obj.tags)

    async def load_lora_adapter_from_tensors(self, obj: Any, _: Any = None) -> Any:
        success, message = await self._control("load_lora_adapter_from_tensors", obj.lora_name)
        return SimpleNamespace(success=success, error_message=message)

    async def unload_lora_adapter(self, obj: Any, _: Any = None) -> Any:
        success, message = await self._control("unload_lora_adapter", obj.lora_name)
        return SimpleNamespace(success=success, error_message=message)


# Fields of the request objects that ``sglang_process`` makes.
REQUEST_FIELDS: dict[str, tuple[str, ...]] = {
    "GenerateReqInput": (
        "rid", "input_ids", "image_data", "sampling_params", "return_logprob", "return_prompt_token_ids", "cache_salt",
        "lora_path",
    ),
    "BeginWeightUpdateReqInput": (),
    "EndWeightUpdateReqInput": (),
    "UpdateWeightsFromTensorReqInput": (
        "serialized_named_tensors", "load_format", "flush_cache", "weight_version"
    ),
    "ReleaseMemoryOccupationReqInput": ("tags",),
    "ResumeMemoryOccupationReqInput": ("tags",),
    "LoadLoRAAdapterFromTensorsReqInput": ("lora_name", "config_dict", "serialized_named_tensors"),
    "UnloadLoRAAdapterReqInput": ("lora_name",),
}  # fmt: skip


class _Bucket:
    """``FlattenedTensorBucket``."""

    def __init__(self, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
        ends = torch.tensor([tensor.nbytes for _, tensor in named_tensors]).cumsum(0).tolist()
        self._flat = torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in named_tensors])
        self._metadata = [
            SimpleNamespace(name=name, shape=t.shape, dtype=t.dtype, start_idx=end - t.nbytes, end_idx=end)
            for (name, t), end in zip(named_tensors, ends, strict=True)
        ]

    def get_flattened_tensor(self) -> Tensor:
        return self._flat

    def get_metadata(self) -> list[Any]:
        return self._metadata


def install(monkeypatch: pytest.MonkeyPatch, core: FakeSglang) -> None:
    """Modules of sglang, as far as ``sglang_process`` imports them, for one test."""
    requests = {
        name: make_dataclass(name, [(item, Any, field(default=None)) for item in fields])
        for name, fields in REQUEST_FIELDS.items()
    }

    def kill_process_tree(pid: int, include_parent: bool = True, wait_timeout: float | None = None) -> None:
        core.dead = True

    contents: dict[str, dict[str, Any]] = {
        "sglang": {},
        "sglang.srt": {},
        "sglang.srt.managers": {},
        "sglang.srt.managers.io_struct": requests,
        "sglang.srt.managers.mm_utils": {"hash_feature": hash_feature},
        "sglang.srt.weight_sync": {},
        "sglang.srt.weight_sync.tensor_bucket": {"FlattenedTensorBucket": _Bucket},
        "sglang.srt.utils": {
            "kill_process_tree": kill_process_tree,
            "MultiprocessingSerializer": SimpleNamespace(serialize=pickle.dumps),
        },
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
