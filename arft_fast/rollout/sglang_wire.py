"""A turn in SGLang's terms and back: pure functions, the same for an engine in this process and for servers.

Facts that they rest on (read in sglang 0.5.21 and tested against it): ``logit_bias`` is added to the logits before the
softmax that log-probs are taken from, so that -1e9 makes an id's probability exactly 0 and the log-probs are those of
the biased distribution, as the trainer's are; log-probs follow the temperature, and are taken before top-k and top-p;
the token that completes a stop string or ends the turn stays in ``output_ids``.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from arft_fast.policy.images import EncodedImage
from arft_fast.rollout.engine import EngineError, Generation, PromptMismatch, Sampling
from arft_fast.rollout.sglang_backend import SglangRequest

_BAN = -1e9  # finite: JSON has no infinity; its exp is 0 in every dtype


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What SGLang says of one request, checked."""

    token_ids: list[int]
    logprobs: list[float]
    finish: str
    cached_tokens: int
    queued_s: float


def build_request(
    token_ids: Sequence[int],
    images: Sequence[EncodedImage],
    params: dict[str, Any],
    *,
    image_token_id: int,
    group: str,
    version: int,
) -> SglangRequest:
    """The request for one turn, under a name of its own.

    Raises:
        ValueError: see ``collapse``.
    """
    return SglangRequest(
        rid=uuid.uuid4().hex,
        input_ids=collapse(token_ids, images, image_token_id),
        expanded_ids=list(token_ids),
        images=images,
        sampling_params=params,
        group=group,
        cache_salt=f"v{version}",
    )


def prompt_only(request: SglangRequest) -> SglangRequest:
    """A request that computes the same prompt, leaves it in the cache and samples nothing."""
    return replace(
        request, rid=f"{request.rid}-prompt", sampling_params={**request.sampling_params, "max_new_tokens": 0}
    )


def collapse(token_ids: Sequence[int], images: Sequence[EncodedImage], image_token_id: int) -> list[int]:
    """``token_ids`` with each image's run of placeholders replaced by one.

    Raises:
        ValueError: the runs are not those of ``images``.
    """
    collapsed: list[int] = []
    runs: list[int] = []
    for index, token in enumerate(token_ids):
        if token != image_token_id:
            collapsed.append(token)
        elif index and token_ids[index - 1] == token:
            runs[-1] += 1
        else:
            collapsed.append(token)
            runs.append(1)
    wanted = [image.tokens for image in images]
    if runs != wanted:
        raise ValueError(
            f"token_ids: runs of image placeholders of lengths {runs} for images of {wanted} tokens; "
            "give one run for each image, in order, one placeholder for each merged patch"
        )
    return collapsed


def sampling_params(
    sampling: Sampling, *, banned: Sequence[int], end_of_turn_id: int, deterministic: bool
) -> dict[str, Any]:
    """SGLang's sampling parameters.

    Args:
        banned: ids that must not be sampled.
        deterministic: the engine runs with ``enable_deterministic_inference``, the only mode in which a seed acts.
    """
    params: dict[str, Any] = {
        "max_new_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "stop": list(sampling.stop),
        "stop_token_ids": [end_of_turn_id],
        "no_stop_trim": True,
        "skip_special_tokens": False,
        "logit_bias": {str(token): _BAN for token in banned},
    }
    if deterministic:
        params["sampling_seed"] = sampling.seed
    return params


def read_reply(reply: Mapping[str, Any], request: SglangRequest) -> Reply:
    """The checked contents of SGLang's answer to ``request``.

    Raises:
        PromptMismatch: it computed another prompt.
        EngineError: it ended the request itself, cut it short, or its answer lacks what was asked for.
    """
    try:
        meta = reply["meta_info"]
        reason = meta["finish_reason"] or {}
        finish = reason.get("type")
        if finish not in ("stop", "length"):
            raise EngineError(f"SGLang ended request {request.rid} ({reason.get('message') or finish or 'no reason'})")
        _check_prompt(reply["prompt_token_ids"], request.expanded_ids)
        limit = request.sampling_params["max_new_tokens"]
        token_ids = [int(token) for token in reply["output_ids"]] if limit else []
        sampled = meta["output_token_logprobs"][: len(token_ids)]
        logprobs = [float(entry[0]) for entry in sampled]
        cached = int(meta["cached_tokens"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EngineError(
            f"SGLang's reply to request {request.rid} cannot be read ({error!r}); use sglang 0.5.18 to 0.5.23"
        ) from error
    if [int(entry[1]) for entry in sampled] != token_ids:
        raise EngineError(f"SGLang's reply to request {request.rid}: log-probs and output_ids are of different tokens")
    if finish == "length" and len(token_ids) < limit:
        raise EngineError(
            f"SGLang cut request {request.rid} at {len(token_ids)} of {limit} tokens: its cache is too small for the "
            "longest trajectory; give it more memory or lower rollout.max_tokens"
        )
    return Reply(
        token_ids=token_ids, logprobs=logprobs, finish=finish, cached_tokens=cached,
        queued_s=float(meta.get("queue_time") or 0.0),
    )  # fmt: skip


def _check_prompt(computed: Sequence[int], sent: Sequence[int]) -> None:
    if list(computed) == list(sent):
        return
    pairs = enumerate(zip(computed, sent, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(computed), len(sent)))
    raise PromptMismatch(
        f"SGLang computed another prompt than it was sent: {len(computed)} ids for {len(sent)}, the first difference "
        f"at {at} ({list(computed[at : at + 3])} for {list(sent[at : at + 3])}); set SGLANG_MM_AVOID_RETOKENIZE=1 and "
        "give it the policy's own tokenizer and image processor settings (min_pixels, max_pixels)"
    )


def read_generation(
    reply: Mapping[str, Any],
    request: SglangRequest,
    *,
    prompt_reply: Mapping[str, Any] | None,
    weight_version: int,
    seconds: float,
    waited_s: float,
) -> Generation:
    """One turn from SGLang's reply.

    Args:
        prompt_reply: answer to ``prompt_only(request)`` where this call led its group: what that computed counts here.
        waited_s: time spent behind the group's leader.

    Raises:
        EngineError: see ``read_reply``.
    """
    turn = read_reply(reply, request)
    cached, prefilled = turn.cached_tokens, len(request.expanded_ids) - turn.cached_tokens
    queued_s = waited_s + turn.queued_s
    if prompt_reply is not None:
        prompt = read_reply(prompt_reply, prompt_only(request))
        cached = prompt.cached_tokens
        prefilled += len(request.expanded_ids) - prompt.cached_tokens
        queued_s += prompt.queued_s
    return Generation(
        token_ids=turn.token_ids,
        logprobs=turn.logprobs,
        finish="stop" if turn.finish == "stop" else "length",
        cached_tokens=cached,
        prefilled_tokens=prefilled,
        weight_version=weight_version,
        seconds=seconds,
        queued_s=queued_s,
    )
