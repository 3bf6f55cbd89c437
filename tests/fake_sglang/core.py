"""The fake's core: SGLang's rules about requests, caches, weights and memory, whoever asks."""

from __future__ import annotations

import io
import pickle
import queue
import threading
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from arft_fast.policy.model import Policy

from .model import FakeModel, Refused


class SchedulerDied(Exception):
    """The scheduler is gone: over HTTP the connection breaks, in a process nobody answers any more."""


@dataclass(eq=False)
class _Running:
    aborted: bool = False


@dataclass(eq=False)
class FakeSglang:
    """The core. Its steps are atomic; between them others run."""

    source: Policy
    tp_size: int = 1
    vision_cache: bool = True
    """Embeddings of images are kept by their hash, whatever happens to the weights (SGLANG_VLM_CACHE_SIZE_MB > 0)."""
    token_s: float = 0.0
    context_length: int = 512

    weight_version: str = "default"
    paused: bool = False
    session: bool = False
    released: bool = False
    dead: bool = False
    retokenises: bool = False
    """Falls back to decode and encode, as it does when it miscounts the placeholders."""
    prefilled: int = 0
    samples: int = 0
    """Requests that sampled, so not prompts alone."""
    orders: list[dict[str, Any]] = field(default_factory=list)
    """What was asked to be generated."""
    calls: list[str] = field(default_factory=list)
    """Control methods that were called."""
    refusals: Counter[str] = field(default_factory=Counter)
    """How many of the next calls of a method fail: ``success=False``, or a refusal of ``generate``."""
    inbox: queue.Queue[Tensor] = field(default_factory=queue.Queue)
    """What was broadcast to it."""
    adapters: set[str] = field(default_factory=set)
    running: dict[str, _Running] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self.model = FakeModel(self.source, self.vision_cache)
        self._radix: dict[str, list[list[Any]]] = {}
        self._unsettled = False

    # Requests

    def generate(self, order: Mapping[str, Any]) -> Generator[dict[str, Any] | None, None, None]:
        """None wherever others may run, the reply at last."""
        params, salt, rid = order["sampling_params"], order.get("cache_salt") or "", order["rid"]
        self.orders.append(dict(order))
        if self.refusals["generate"] > 0:
            self.refusals["generate"] -= 1
            raise Refused("generate was told to fail")
        if rid in self.running:
            raise Refused(f"Duplicate request ID detected: {rid}")
        prompt = self.model.prompt(order, self.retokenises)
        if len(prompt.ids) + params["max_new_tokens"] > self.context_length:
            raise Refused(f"Requested token count exceeds the model's maximum context length of {self.context_length}")
        state = self.running[rid] = _Running()
        try:
            while self.paused:
                yield None
            cached = self._cached(salt, prompt.keys)
            yield None  # those that come now do not find this prompt either
            self.prefilled += len(prompt.ids) - cached
            self._radix.setdefault(salt, []).append(prompt.keys)
            features = [self.model.image_features(*pair) for pair in zip(prompt.images, prompt.hashes, strict=True)]
            sampled: list[tuple[float, int, None]] = []
            finish = {"type": "length", "length": 0}
            while len(sampled) < params["max_new_tokens"] and finish["type"] == "length":
                yield None
                if state.aborted:
                    finish = {"type": "abort", "message": "Abort in waiting queue"}
                    break
                sampled.append(self.model.sample(prompt, features, [token for _, token, _ in sampled], params))
                finish = self.model.finish([token for _, token, _ in sampled], params)
            output_ids = [token for _, token, _ in sampled]
            self._radix[salt].append(prompt.keys + output_ids[:-1])
            self.samples += bool(params["max_new_tokens"])
        finally:
            del self.running[rid]
            self._unsettled = True
        reply: dict[str, Any] = {"text": self.model.policy.tokenizer.decode(output_ids), "output_ids": output_ids}
        reply["meta_info"] = {
            "id": rid,
            "finish_reason": finish,
            "prompt_tokens": len(prompt.ids),
            "completion_tokens": len(output_ids),
            "cached_tokens": cached,
            "weight_version": self.weight_version,
            "output_token_logprobs": sampled if order.get("return_logprob") else [],
        }
        if order.get("return_prompt_token_ids"):
            reply["prompt_token_ids"] = prompt.ids
        yield reply

    def _cached(self, salt: str, keys: list[Any]) -> int:
        best = 0
        for known in self._radix.get(salt, []):
            same = next(
                (i for i, (a, b) in enumerate(zip(keys, known, strict=False)) if a != b), min(len(keys), len(known))
            )
            best = max(best, same)
        return min(best, len(keys) - 1)  # the last token is always computed: its logits are wanted

    def abort(self, rid: str = "", abort_all: bool = False) -> None:
        """Unknown names do nothing."""
        for name, state in self.running.items():
            state.aborted |= abort_all or name == rid

    # Control: (success, message), and no exception

    def control(self, method: str, *arguments: Any, **named: Any) -> tuple[bool, str]:
        self.calls.append(method)
        if self.dead:
            raise SchedulerDied
        if self.refusals[method] > 0:
            self.refusals[method] -= 1
            return False, f"{method} was told to fail"
        return getattr(self, f"_{method}")(*arguments, **named)

    def _begin_weight_update(self) -> tuple[bool, str]:
        if self.session:
            return False, "a weight-update session is already open; call end_weight_update() first"
        self.session = True
        return True, "Success"

    def _end_weight_update(self) -> tuple[bool, str]:
        if not self.session:
            return False, "no weight-update session is open; call begin_weight_update() first"
        self.session = False
        return True, "Success"

    def _update_weights_from_tensor(self, payloads: Sequence[bytes], load_format: str | None) -> tuple[bool, str]:
        if not self.session:
            return False, "update_weights_from_tensor must run between begin_weight_update() and end_weight_update()"
        if len(payloads) != self.tp_size or load_format != "flattened_bucket":
            self.die()  # a rank finds no payload of its own, or no names in it
        return self._load(unflatten(FakeUnpickler(io.BytesIO(payloads[0])).load()))

    def _update_weights_from_distributed(
        self, names: list[str], dtypes: list[str], shapes: list[list[int]]
    ) -> tuple[bool, str]:
        if not self.session:
            return False, "update_weights_from_distributed must run between begin_weight_update() and ..."
        flat, start, named = self.inbox.get(timeout=5), 0, []
        for name, dtype, shape in zip(names, dtypes, shapes, strict=True):
            empty = torch.empty(shape, dtype=getattr(torch, dtype))
            named.append((name, flat[start : start + empty.nbytes].view(empty.dtype).reshape(shape)))
            start += empty.nbytes
        return self._load(named)

    def _update_weights_from_disk(self, model_path: str) -> tuple[bool, str]:
        files = sorted(Path(model_path).glob("*.safetensors"))
        if not files:
            return False, f"Failed to get weights iterator: no weights in {model_path}."
        return self._load([pair for path in files for pair in load_file(path).items()])

    def _load(self, named: Sequence[tuple[str, Tensor]]) -> tuple[bool, str]:
        try:
            self.model.load(named)
        except KeyError:
            self.die()  # SGLang's loader does
        return True, "Success"

    def _update_weight_version(self, version: str) -> tuple[bool, str]:
        self.weight_version = version
        return True, "Success"

    def _flush_cache(self) -> tuple[bool, str]:
        """Image embeddings stay."""
        settled, self._unsettled = not self._unsettled, False
        if self.running or not settled:
            return False, "Cache not flushed because there are pending requests."
        self._radix.clear()
        return True, ""

    def _pause_generation(self, mode: str = "abort") -> tuple[bool, str]:
        self.paused = True
        if mode == "abort":
            self.abort(abort_all=True)
        return True, ""

    def _continue_generation(self) -> tuple[bool, str]:
        self.paused = False
        return True, ""

    def _release_memory_occupation(self) -> tuple[bool, str]:
        if self.running:
            self.die()  # an assertion of the scheduler
        self.released = True
        return True, ""

    def _resume_memory_occupation(self, tags: list[str] | None = None) -> tuple[bool, str]:
        self.released = False
        return True, ""

    def _init_weights_update_group(self, **group: Any) -> tuple[bool, str]:
        return True, "Succeeded to initialize custom process group."

    def _destroy_weights_update_group(self, group_name: str) -> tuple[bool, str]:
        return True, "Succeeded to destroy custom process group."

    def _load_lora_adapter_from_tensors(self, name: str) -> tuple[bool, str]:
        known = name in self.adapters
        self.adapters.add(name)
        return not known, f"LoRA adapter '{name}' is already loaded"

    def _unload_lora_adapter(self, name: str) -> tuple[bool, str]:
        known = name in self.adapters
        self.adapters.discard(name)
        return known, f"LoRA adapter '{name}' is not loaded"

    def die(self) -> None:
        self.dead = True
        raise SchedulerDied


class FakeUnpickler(pickle.Unpickler):
    """SGLang's allow-list, as far as weights go."""

    allowed: ClassVar = {
        ("types", "SimpleNamespace"),
        ("collections", "OrderedDict"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch.storage", "_load_from_bytes"),
        ("torch", "Size"),
        ("torch", "float32"),
        ("torch", "bfloat16"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise RuntimeError(f"Blocked unsafe global ({module}.{name}) during pickle deserialization")
        return super().find_class(module, name)


def unflatten(bucket: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """Named tensors of a flattened bucket."""
    flat = bucket["flattened_tensor"]
    return [(m.name, flat[m.start_idx : m.end_idx].view(m.dtype).reshape(m.shape)) for m in bucket["metadata"]]
