"""A policy's weights under the names of a checkpoint, for engines that keep a copy of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from arft_fast.policy.model import Policy


def checkpoint_tensors(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors as ``save_pretrained`` writes them, tied weights once; contiguous, on the model's device.

    transformers 5 names modules otherwise than checkpoints do (``model.visual`` for ``visual``), and an engine that is
    given its names dies of a KeyError. These are the model's own tensors, not copies; weights that transformers merges
    when it loads (experts of a mixture) are split again, which copies them.
    """
    own = remove_tied_weights_from_state_dict(policy.model.state_dict(), policy.model)
    for name, tensor in revert_weight_conversion(policy.model, own).items():
        yield name, tensor.detach().contiguous()


def buckets(tensors: Iterable[tuple[str, Tensor]], size: int) -> Iterator[list[tuple[str, Tensor]]]:
    """``tensors`` in order, in lists of at most ``size`` bytes; one that is larger gets a list of its own.

    Raises:
        ValueError: ``size`` is not above 0.
    """
    if size <= 0:
        raise ValueError(f"size: {size} bytes hold no tensor; give a number above 0")
    bucket: list[tuple[str, Tensor]] = []
    filled = 0
    for name, tensor in tensors:
        if bucket and filled + tensor.nbytes > size:
            yield bucket
            bucket, filled = [], 0
        bucket.append((name, tensor))
        filled += tensor.nbytes
    if bucket:
        yield bucket
