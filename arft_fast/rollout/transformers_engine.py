"""The embedded engine: continuous batching on the policy's own transformers model, in this process, on any device.

Every request is one turn of one trajectory, and they come and go at any time. A slot keeps the keys and values of the
last sequence it held, so a trajectory's next turn computes only what was added, and a prompt that several samples share
is computed once and copied. Between two decoding steps new requests are let in.

What a request samples does not depend on what else is running: its random stream is its own, and every forward pass has
a shape that only the request itself decides (decoding: all slots at once; prefill: a fixed number of rows for its
padded length), so the arithmetic of a row is the same in any company.

Forward passes run on the event loop's own thread, a step at a time: OpenMP keeps a team of workers for each thread that
computes, and with a second team beside the trainer's a step took 1.7 times as long on two cores.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from arft_fast.policy.forward import embed, image_features, rope_positions
from arft_fast.policy.images import EncodedImage
from arft_fast.policy.model import Policy
from arft_fast.rollout.engine import Generation, Sampling
from arft_fast.rollout.kv_cache import SlotCache
from arft_fast.rollout.sampling import sample

_BUCKET = 16  # prefill lengths are padded to a multiple of this
_PREFILL_TOKENS = 64  # short prefills share a forward pass of about this many tokens
_LOOP_PASSES = 6  # of the event loop between two steps
_VISIBLE = 128  # decoding attends to a multiple of this many columns


@dataclass(eq=False)
class _Request:
    """One turn being generated."""

    token_ids: np.ndarray
    images: Sequence[EncodedImage]
    sampling: Sampling
    done: asyncio.Future[Generation]
    keys: np.ndarray
    """[T] int64: what each token is, for comparing prefixes; an image placeholder is its image's content and index."""
    positions: Tensor
    """[3, T]"""
    started: float = field(default_factory=time.perf_counter)
    cached: int = 0
    sampled: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    random: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.sampling.seed)


@dataclass(eq=False)
class _Slot:
    """One row of the cache."""

    index: int
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """[length] what is cached (see ``_Request.keys``)."""
    hidden: Tensor | None = None
    """Last hidden state [D] of what is cached, until something is decoded behind it: a prompt's samples start here."""
    request: _Request | None = None
    next_position: int = 0
    used: int = 0


class TransformersEngine:
    """See the module's text. One event loop at a time; ``close`` before the loop ends."""

    def __init__(self, policy: Policy, *, slots: int, max_tokens: int) -> None:
        """Args:
        slots: sequences decoded together; further requests wait.
        max_tokens: longest sequence, prompt and all turns, that a request may hold.
        """
        self._policy = policy
        self._max_tokens = max_tokens
        text_config = policy.model.config.get_text_config()
        # One slot more than is handed out takes the rows that only fill a forward pass up to its fixed shape.
        self._cache = SlotCache(
            text_config, slots=slots + 1, capacity=-(-(max_tokens + 1) // _VISIBLE) * _VISIBLE + _BUCKET,
            dtype=policy.model.dtype, device=policy.device,
        )  # fmt: skip
        self._slots = [_Slot(index) for index in range(slots)]
        self._waiting: deque[_Request] = deque()
        self._features: dict[str, Tensor] = {}
        self._loop_task: asyncio.Task[None] | None = None
        self._version = 0
        self._clock = 0
        self._text: dict[int, str] = {}

    async def generate(
        self, token_ids: Sequence[int], images: Sequence[EncodedImage], sampling: Sampling
    ) -> Generation:
        """Continue ``token_ids`` by one turn; see ``Engine``.

        Raises:
            ValueError: the sequence and its turn do not fit into ``max_tokens``.
        """
        if not 0 < len(token_ids) <= self._max_tokens - sampling.max_tokens:
            raise ValueError(
                f"token_ids: {len(token_ids)} ids and up to {sampling.max_tokens} sampled ones do not fit into "
                f"{self._max_tokens} tokens; raise rollout.max_tokens or shorten the prompt"
            )
        ids = np.asarray(token_ids, dtype=np.int64)
        request = _Request(
            token_ids=ids,
            images=images,
            sampling=sampling,
            done=asyncio.get_running_loop().create_future(),
            keys=self._prefix_keys(ids, images),
            positions=rope_positions(self._policy.model, ids, images),
        )
        self._waiting.append(request)
        if self._loop_task is None or self._loop_task.done():
            self._loop_task = asyncio.create_task(self._serve(), name="transformers engine")
        return await request.done

    def load_weights(self, version: int) -> None:
        """The model is the policy itself: forget what older weights computed."""
        assert all(slot.request is None for slot in self._slots), "weights change only while nothing is generated"
        self._version = version
        self._features.clear()
        for slot in self._slots:
            slot.keys, slot.hidden = slot.keys[:0], None

    async def close(self) -> None:
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)
        for request in [*self._waiting, *(slot.request for slot in self._slots if slot.request)]:
            request.done.cancel()

    async def _serve(self) -> None:
        """Admit, compute, answer, until nothing is left to do."""
        try:
            while self._waiting or any(slot.request for slot in self._slots):
                admitted = self._admit()
                finished = self._advance(admitted)
                for slot, request, finish in finished:
                    slot.request = None
                    if not request.done.done():  # its trajectory may have been cancelled
                        request.done.set_result(self._result(request, finish))
                # Trajectories that were answered put their next request, and tools' replies get through, before the
                # next step: a reply takes a few passes of the loop from the pipe to its trajectory.
                for _ in range(_LOOP_PASSES):
                    await asyncio.sleep(0)
        except Exception as error:  # a failed forward pass must reach the callers, not vanish with this task
            for request in [*self._waiting, *(slot.request for slot in self._slots if slot.request)]:
                if not request.done.done():
                    request.done.set_exception(error)
            self._waiting.clear()
            for slot in self._slots:
                slot.request, slot.keys, slot.hidden = None, slot.keys[:0], None

    def _result(self, request: _Request, finish: str) -> Generation:
        return Generation(
            token_ids=request.sampled,
            logprobs=request.logprobs,
            finish="stop" if finish == "stop" else "length",
            cached_tokens=request.cached,
            prefilled_tokens=len(request.token_ids) - request.cached,
            weight_version=self._version,
            seconds=time.perf_counter() - request.started,
        )

    def _prefix_keys(self, ids: np.ndarray, images: Sequence[EncodedImage]) -> np.ndarray:
        keys = ids.copy()
        if images:
            content = [
                np.array([hash((image.key, k)) | (1 << 62) for k in range(image.tokens)], dtype=np.int64)
                for image in images
            ]
            keys[ids == self._policy.chat.image_token_id] = np.concatenate(content)
        return keys

    # ---- scheduling (event loop) ----

    def _admit(self) -> list[_Slot]:
        """Give waiting requests a slot each, with the longest prefix that any slot holds copied or continued in place.

        A request whose prefix is just being computed by another one waits a round: that is how G samples of one prompt
        cost one prefill.
        """
        admitted: list[_Slot] = []
        put_off: list[_Request] = []
        while self._waiting:
            free = [slot for slot in self._slots if slot.request is None]
            if not free:
                break
            request = self._waiting.popleft()
            if request.done.done():
                continue
            shared = {slot.index: _common_prefix(slot.keys, request.keys) for slot in self._slots}
            best = max(self._slots, key=lambda slot: (shared[slot.index], slot.request is None, -slot.index))
            length = shared[best.index]
            coming = max(
                (_common_prefix(slot.request.keys, request.keys) for slot in admitted if slot.request), default=0
            )
            if coming > length:
                put_off.append(request)
                continue
            if length == len(request.keys) and best.hidden is None:
                length -= 1  # the last token is computed again for its hidden state
            continues = best.request is None and length == len(best.keys)
            slot = best if continues else min(free, key=lambda slot: (len(slot.keys) > 0, slot.used, slot.index))
            if slot is not best:
                self._cache.copy_prefix(best.index, slot.index, length)
            slot.hidden = best.hidden if length == len(request.keys) else None
            slot.keys = request.keys[:length]
            slot.request, request.cached = request, length
            slot.next_position = int(request.positions[:, -1].max()) + 1
            self._clock += 1
            slot.used = self._clock
            admitted.append(slot)
        self._waiting.extendleft(reversed(put_off))
        return admitted

    # ---- computing ----

    @torch.inference_mode()
    def _advance(self, admitted: list[_Slot]) -> list[tuple[_Slot, _Request, str]]:
        """Prefill what was admitted, then sample one token for every running request."""
        by_length: dict[int, list[_Slot]] = {}
        for slot in admitted:
            assert slot.request is not None
            if missing := len(slot.request.keys) - len(slot.keys):
                by_length.setdefault(-(-missing // _BUCKET) * _BUCKET, []).append(slot)
        for length, slots in by_length.items():
            rows = max(1, _PREFILL_TOKENS // length)
            for start in range(0, len(slots), rows):
                self._prefill(slots[start : start + rows], rows, length)
        started = [slot for slot in admitted if slot.hidden is not None]
        running = [slot for slot in self._slots if slot.request is not None and slot.request.sampled]
        finished = self._decode(running) if running else []
        if started:
            finished += self._sample(started, torch.stack([slot.hidden for slot in started if slot.hidden is not None]))
        return finished

    def _prefill(self, slots: list[_Slot], rows: int, length: int) -> None:
        """Compute the missing tokens of ``slots``; [rows, length] whatever their number."""
        device = self._policy.device
        ids = torch.zeros(rows, length, dtype=torch.long)
        positions = torch.zeros(3, rows, length, dtype=torch.long)
        columns = torch.arange(length).repeat(rows, 1)
        index = torch.full((rows,), len(self._slots))
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
        columns.clamp_(max=self._cache.capacity - 1)
        embeddings = embed(self._policy.model, ids.to(device), features)
        hidden = self._forward(embeddings, positions.to(device), index.to(device), columns.to(device), visible)
        for row, slot in enumerate(slots):
            assert slot.request is not None
            slot.hidden = hidden[row, len(slot.request.keys) - len(slot.keys) - 1]
            slot.keys = slot.request.keys

    def _new_features(self, request: _Request, known: int) -> list[Tensor]:
        """Features of the placeholders behind the first ``known`` tokens, image by image."""
        is_image = request.token_ids == self._policy.chat.image_token_id
        skip = int(is_image[:known].sum())
        features = []
        for image in request.images:
            if image.key not in self._features:
                self._features.update(image_features(self._policy.model, [image]))
            if skip < image.tokens:
                features.append(self._features[image.key][skip:])
            skip = max(0, skip - image.tokens)
        return features

    def _forward(
        self, embeddings: Tensor, positions: Tensor, slots: Tensor | None, columns: Tensor, visible: int
    ) -> Tensor:
        seen = torch.arange(visible, device=columns.device) <= columns[..., None]  # [B, T, L]
        output = self._policy.model.model.language_model(
            inputs_embeds=embeddings,
            position_ids=positions,
            attention_mask={"full_attention": seen[:, None]},
            past_key_values=self._cache.view(slots, columns, visible),
            use_cache=True,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _decode(self, running: list[_Slot]) -> list[tuple[_Slot, _Request, str]]:
        """One token for each of ``running``; all slots take part so that the shape never changes."""
        device = self._policy.device
        count = len(self._slots) + 1
        ids = torch.zeros(count, 1, dtype=torch.long)
        positions = torch.zeros(3, count, 1, dtype=torch.long)
        columns = torch.zeros(count, 1, dtype=torch.long)
        for slot in self._slots:  # an idle slot writes behind what it holds, where the next turn overwrites it
            columns[slot.index] = len(slot.keys)
        for slot in running:
            assert slot.request is not None
            ids[slot.index] = slot.request.sampled[-1]
            positions[:, slot.index] = slot.next_position
        visible = -(-int(columns.max() + 1) // _VISIBLE) * _VISIBLE
        embeddings = embed(self._policy.model, ids.to(device), [])
        hidden = self._forward(embeddings, positions.to(device), None, columns.to(device), visible)[:, 0]
        for slot in running:
            assert slot.request is not None
            slot.keys = np.append(slot.keys, slot.request.sampled[-1])
            slot.next_position += 1
            slot.hidden = None
        return self._sample(running, hidden[[slot.index for slot in running]])

    def _sample(self, slots: list[_Slot], hidden: Tensor) -> list[tuple[_Slot, _Request, str]]:
        requests = [slot.request for slot in slots if slot.request is not None]
        index = [slot.index for slot in slots]
        rows = hidden.new_zeros(len(self._slots) + 1, hidden.shape[-1])  # again one shape in any company
        rows[index] = hidden
        logits = torch.nn.functional.linear(rows, self._policy.head.weight)[index].float() + self._policy.logit_bias
        ids, logprobs = sample(logits, [r.sampling for r in requests], [r.random.random() for r in requests])
        finished = []
        for slot, request, token, logprob in zip(slots, requests, ids.tolist(), logprobs.tolist(), strict=True):
            request.sampled.append(token)
            request.logprobs.append(logprob)
            if token == self._policy.chat.end_of_turn_id or self._closes(request):
                finished.append((slot, request, "stop"))
            elif len(request.sampled) >= request.sampling.max_tokens:
                finished.append((slot, request, "length"))
        return finished

    def _closes(self, request: _Request) -> bool:
        """Whether the text now ends in a stop string, perhaps with more text behind it in the same token."""
        last = request.sampled[-1]
        if last not in self._text:
            self._text[last] = self._policy.tokenizer.decode([last])
        if not any(stop[-1] in self._text[last] for stop in request.sampling.stop):
            return False
        tail = self._policy.tokenizer.decode(request.sampled[-16:])
        return any(stop in tail for stop in request.sampling.stop)


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
