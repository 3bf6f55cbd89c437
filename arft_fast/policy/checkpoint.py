"""Weights on disk: the cache of finished cold starts."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

import arft_fast
from arft_fast.policy.model import Policy

# A cold start's outcome can depend on any of these, so that a change of one starts anew.
_LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "pillow")


class WeightCache:
    """A folder of weights under a key of everything they depend on: settings, sources and library versions."""

    def __init__(self, folder: Path, depends_on: Mapping[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(dict(depends_on), sort_keys=True, default=str).encode())
        for name in _LIBRARIES:
            digest.update(f"{name}={version(name)}".encode())
        for source in sorted(Path(arft_fast.__file__).parent.rglob("*.py")):
            digest.update(source.read_bytes())
        self.path = folder / f"{digest.hexdigest()[:24]}.safetensors"

    def load(self, policy: Policy) -> bool:
        """Put the cached weights into ``policy``; False when there are none."""
        if not self.path.is_file():
            return False
        weights = load_file(self.path, device=str(policy.device))
        missing = policy.model.load_state_dict(weights, strict=False).missing_keys
        tied = set(policy.model.state_dict()) - set(_own_tensors(policy))
        assert set(missing) <= tied, f"{self.path} lacks weights {sorted(set(missing) - tied)}"
        return True

    def save(self, policy: Policy) -> None:
        """Keep the weights; a reader sees a whole file or none."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(dir=self.path.parent, suffix=".part")
        os.close(handle)
        try:
            save_file(_own_tensors(policy), unfinished)
            os.replace(unfinished, self.path)
        except BaseException:
            os.unlink(unfinished)
            raise


def _own_tensors(policy: Policy) -> dict[str, Any]:
    """The state dict with each storage once: safetensors refuses tied weights stored twice."""
    seen: set[int] = set()
    own = {}
    for name, tensor in policy.model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            own[name] = tensor.contiguous()
    return own


def replace_checkpoint(policy: Policy, folder: Path) -> None:
    """Write the policy to ``folder`` as a whole: an older one stays until the new one is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        policy.save(unfinished)
        unfinished.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
