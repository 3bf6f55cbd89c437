"""The embedded engine: continuous batching on the policy's own transformers model, in this process, on any device.

Every request is one turn of one trajectory, and they come and go at any time. A slot keeps the keys and values of the
last sequence it held, so a trajectory's next turn computes only what was added, and a prompt that several samples share
is computed once and copied. Between two decoding steps new requests are let in.

What a request samples does not depend on what else is running: its random stream is its own, and every forward pass has
a shape that only the request itself decides (decoding: all slots at once; prefill: a fixed number of rows for its
padded length), so the arithmetic of a row is the same in any company.

On a CPU, forward passes run on the event loop's own thread, a step (milliseconds) at a time: OpenMP keeps a team of
workers for each thread that computes, and with a second team beside the trainer's a step took 1.7 times as long on two
cores. On a GPU they run in a thread of their own, and the loop stays free for the tools.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arft_fast.observe.timeline import Timeline
from arft_fast.policy.batch import rope_positions
from arft_fast.policy.images import EncodedImage
from arft_fast.policy.model import Policy
from arft_fast.policy.prefix_tree import merge_keys
from arft_fast.policy.vision import embed, image_features
from arft_fast.rollout.engine import EngineBusy, Generation, Sampling
from arft_fast.rollout.kv_cache import SlotCache
from arft_fast.rollout.sampling import StopStrings, sample
from arft_fast.rollout.slots import Request, Slot, Slots

_BUCKET = 16  # prefill lengths are padded to a multiple of this
_PREFILL_TOKENS = 64  # short prefills share a forward pass of about this many tokens
_COMPANY, _PATIENCE = 4, 3  # so many requests are let in together, or whoever has waited for so many decoding steps
_LOOP_PASSES = 6  # of the event loop between two steps
_VISIBLE = 128  # decoding attends to a multiple of this many columns
_SAME_STRETCH_S = 1e-3  # a shorter pause between two steps is the loop's bookkeeping, not an idle engine
_Finished = list[tuple[Slot, Request, str]]


class TransformersEngine:
    """See the module's text. One event loop at a time; ``close`` before the loop ends."""

    def __init__(
        self,
        policy: Policy,
        *,
        slots: int,
        max_tokens: int,
        timeline: Timeline | None = None,
        threaded: bool | None = None,
    ) -> None:
        """Args:
        slots: sequences decoded together; further requests wait.
        max_tokens: longest sequence, prompt and all turns, that a request may hold.
        timeline: takes a span for each stretch of computation.
        threaded: compute in a thread of its own; None: on a GPU.
        """
        self._policy = policy
        self._max_tokens = max_tokens
        text_config = policy.model.config.get_text_config()
        # One slot more than is handed out takes the rows that only fill a forward pass up to its fixed shape.
        self._cache = SlotCache(
            text_config, slots=slots + 1, capacity=-(-(max_tokens + _BUCKET) // _VISIBLE) * _VISIBLE,
            dtype=policy.model.dtype, device=policy.device,
        )  # fmt: skip
        self._slots = Slots(slots, self._cache)
        self._features: dict[str, Tensor] = {}
        self._numbering: dict[str, int] = {}
        self._loop_task: asyncio.Task[None] | None = None
        self._version = 0
        self._patience = _PATIENCE
        self._stop = StopStrings(policy.tokenizer)
        self._timeline = timeline or Timeline()
        threaded = policy.device.type == "cuda" if threaded is None else threaded
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="transformers-engine") if threaded else None

    async def generate(
        self, token_ids: Sequence[int], images: Sequence[EncodedImage], sampling: Sampling, *, group: str = ""
    ) -> Generation:
        """Continue ``token_ids`` by one turn; see ``Engine``. Shared prefixes are found by content, not by ``group``.

        Raises:
            ValueError: the sequence and its turn do not fit into ``max_tokens``.
        """
        if not 0 < len(token_ids) <= self._max_tokens - sampling.max_tokens:
            raise ValueError(
                f"token_ids: {len(token_ids)} ids and up to {sampling.max_tokens} sampled ones do not fit into "
                f"{self._max_tokens} tokens; raise rollout.max_tokens or shorten the prompt"
            )
        ids = np.asarray(token_ids, dtype=np.int64)
        request = Request(
            token_ids=ids,
            images=images,
            sampling=sampling,
            done=asyncio.get_running_loop().create_future(),
            keys=self._keys(ids, images),
            positions=rope_positions(self._policy.model, ids, images),
        )
        self._slots.wait(request)
        if self._loop_task is None or self._loop_task.done():
            self._loop_task = asyncio.create_task(self._serve(), name="transformers engine")
        return await request.done

    def _keys(self, ids: np.ndarray, images: Sequence[EncodedImage]) -> np.ndarray:
        """What each token is, for comparing prefixes; a placeholder is its image's content and index."""
        contents = [(image.key, image.tokens) for image in images]
        return merge_keys(ids, contents, self._policy.chat.image_token_id, self._numbering)

    async def sleep(self) -> None:
        """The model is the policy itself, and the cache is small: nothing to give back. See ``Engine``."""
        running = sum(not request.done.done() for request in self._slots.requests())
        if running:
            raise EngineBusy(f"{running} requests are still being generated; await or cancel them first")

    async def load_weights(self, version: int) -> None:
        """The model is the policy itself: forget what older weights computed. See ``Engine``."""
        await self.sleep()
        if self._loop_task is not None:
            await self._loop_task  # it may be computing for requests that were cancelled
        self._version = version
        self._features.clear()
        self._numbering.clear()
        self._slots.forget()

    async def close(self) -> None:
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)
        for request in self._slots.requests():
            request.done.cancel()
        if self._thread is not None:
            self._thread.shutdown()

    async def _serve(self) -> None:
        """Admit, compute, answer, until nothing is left to do."""
        began = ended = time.perf_counter()
        try:
            while self._slots.busy:
                now = time.perf_counter()
                if now - ended > _SAME_STRETCH_S:
                    self._timeline.add("engine", "engine", began, ended)
                    began = now
                finished = await self._step(self._slots.admit() if self._worth_a_prefill() else [])
                ended = time.perf_counter()
                for slot, request, finish in finished:
                    slot.request = None
                    if not request.done.done():  # its trajectory may have been cancelled
                        request.done.set_result(self._result(request, finish))
                # Trajectories that were answered put their next request, and tools' replies get through, before the
                # next step: a reply takes a few passes of the loop from the pipe to its trajectory.
                for _ in range(_LOOP_PASSES):
                    await asyncio.sleep(0)
        except Exception as error:  # a failed forward pass must reach the callers, not vanish with this task
            for request in self._slots.requests():
                if not request.done.done():
                    request.done.set_exception(error)
            self._slots.forget()
        finally:
            self._timeline.add("engine", "engine", began, ended)

    def _worth_a_prefill(self) -> bool:
        """A prefill holds up all that decode, and costs four short requests what it costs one."""
        decoding = any(slot.request for slot in self._slots.all)
        self._patience = _PATIENCE if not self._slots.waiting else self._patience - 1
        if decoding and self._slots.waiting < _COMPANY and self._patience > 0 and not self._slots.put_off:
            return False
        self._patience = _PATIENCE
        return True

    async def _step(self, admitted: list[Slot]) -> _Finished:
        if self._thread is None:
            return self._advance(admitted)
        step = asyncio.get_running_loop().run_in_executor(self._thread, self._advance, admitted)
        try:
            return await asyncio.shield(step)
        except asyncio.CancelledError:
            await asyncio.wait([step])  # nobody may touch the model or the cache beside it
            raise

    def _result(self, request: Request, finish: str) -> Generation:
        return Generation(
            token_ids=request.sampled,
            logprobs=request.logprobs,
            finish="stop" if finish == "stop" else "length",
            cached_tokens=request.cached,
            prefilled_tokens=len(request.token_ids) - request.cached,
            weight_version=self._version,
            seconds=time.perf_counter() - request.started,
            queued_s=request.admitted - request.started,
        )

    @torch.inference_mode()
    def _advance(self, admitted: list[Slot]) -> _Finished:
        """Prefill what was admitted, then sample one token for every running request."""
        with torch.cuda.device(self._policy.device) if self._policy.device.type == "cuda" else nullcontext():
            return self._compute(admitted)

    def _compute(self, admitted: list[Slot]) -> _Finished:
        by_length: dict[int, list[Slot]] = {}
        for slot in admitted:
            assert slot.request is not None
            if missing := len(slot.request.keys) - len(slot.keys):
                by_length.setdefault(-(-missing // _BUCKET) * _BUCKET, []).append(slot)
        for length, slots in by_length.items():
            rows = max(1, _PREFILL_TOKENS // length)
            for start in range(0, len(slots), rows):
                self._prefill(slots[start : start + rows], rows, length)
        started = [slot for slot in admitted if slot.hidden is not None]
        running = [slot for slot in self._slots.all if slot.request is not None and slot.request.sampled]
        finished = self._decode(running) if running else []
        if started:
            finished += self._sample(started, torch.stack([slot.hidden for slot in started if slot.hidden is not None]))
        return finished

    def _prefill(self, slots: list[Slot], rows: int, length: int) -> None:
        """Compute the missing tokens of ``slots``; [rows, length] whatever their number."""
        device = self._policy.device
        ids = torch.zeros(rows, length, dtype=torch.long)
        positions = torch.zeros(3, rows, length, dtype=torch.long)
        columns = torch.arange(length).repeat(rows, 1)
        index = torch.full((rows,), len(self._slots.all))
        features: list[Tensor] = []
        for row, slot in enumerate(slots):
            request = slot.request
            assert request is not None
            known, total = len(slot.keys), len(request.keys)
            ids[row, : total - known] = torch.from_numpy(request.token_ids[known:])
            positions[:, row, : total - known] = request.positions[:, known:]
            columns[row] += known
            index[row] = slot.index
            features += self._new_features(request, known)
        visible = -(-int(columns.max() + 1) // _VISIBLE) * _VISIBLE
        inputs = embed(self._policy.model, ids.to(device), features)
        hidden = self._forward(inputs, positions.to(device), index.to(device), columns.to(device), visible)
        for row, slot in enumerate(slots):
            assert slot.request is not None
            slot.hidden = hidden[row, len(slot.request.keys) - len(slot.keys) - 1]
            slot.keys = slot.request.keys

    def _new_features(self, request: Request, known: int) -> list[Tensor]:
        """Features of the placeholders behind the first ``known`` tokens, image by image."""
        is_image = request.token_ids == self._policy.chat.image_token_id
        skip = int(is_image[:known].sum())
        features = []
        for image in request.images:
            if image.key not in self._features:
                self._features.update(image_features(self._policy.model, [image]))
            if skip < image.tokens:
                features.append(self._features[image.key][:, skip:])
            skip = max(0, skip - image.tokens)
        return features

    def _forward(
        self, inputs: Mapping[str, Any], positions: Tensor, slots: Tensor | None, columns: Tensor, visible: int
    ) -> Tensor:
        seen = torch.arange(visible, device=columns.device) <= columns[..., None]  # [B, T, L]
        output = self._policy.language_model(
            **inputs,
            position_ids=positions,
            attention_mask={"full_attention": seen[:, None]},
            past_key_values=self._cache.view(slots, columns, visible),
            use_cache=True,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _decode(self, running: list[Slot]) -> _Finished:
        """One token for each of ``running``; all slots take part so that the shape never changes."""
        device = self._policy.device
        count = len(self._slots.all) + 1
        ids = torch.zeros(count, 1, dtype=torch.long)
        positions = torch.zeros(3, count, 1, dtype=torch.long)
        columns = torch.zeros(count, 1, dtype=torch.long)
        for slot in self._slots.all:  # an idle slot writes behind what it holds, where the next turn overwrites it
            columns[slot.index] = len(slot.keys)
        for slot in running:
            assert slot.request is not None
            ids[slot.index] = slot.request.sampled[-1]
            positions[:, slot.index] = slot.next_position
        visible = -(-int(columns.max() + 1) // _VISIBLE) * _VISIBLE
        inputs = embed(self._policy.model, ids.to(device), [])
        hidden = self._forward(inputs, positions.to(device), None, columns.to(device), visible)[:, 0]
        for slot in running:
            assert slot.request is not None
            slot.keys = np.append(slot.keys, slot.request.sampled[-1])
            slot.next_position += 1
            slot.hidden = None
        return self._sample(running, hidden[[slot.index for slot in running]])

    def _sample(self, slots: list[Slot], hidden: Tensor) -> _Finished:
        requests = [slot.request for slot in slots if slot.request is not None]
        index = [slot.index for slot in slots]
        rows = hidden.new_zeros(len(self._slots.all) + 1, hidden.shape[-1])  # again one shape in any company
        rows[index] = hidden
        logits = torch.nn.functional.linear(rows, self._policy.head.weight)[index].float() + self._policy.logit_bias
        ids, logprobs = sample(logits, [r.sampling for r in requests], [r.random.random() for r in requests])
        finished = []
        for slot, request, token, logprob in zip(slots, requests, ids.tolist(), logprobs.tolist(), strict=True):
            request.sampled.append(token)
            request.logprobs.append(logprob)
            if token == self._policy.chat.end_of_turn_id or self._stop.closes(request.sampled, request.sampling.stop):
                finished.append((slot, request, "stop"))
            elif len(request.sampled) >= request.sampling.max_tokens:
                finished.append((slot, request, "length"))
        return finished
