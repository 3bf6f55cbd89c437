"""Starting ``sglang.Engine`` inside a trainer, and ending it.

The engine is built to own the process that it runs in. What it would do to a trainer, and what is done instead:

- Import and launch change the environment, the event loop policy, multiprocessing's start method and the root logger
  for good. Here all of that is put back once the children have it.
- A child that fails while starting makes it kill this whole process tree. Here that is an ``EngineError``.
- ``Engine.shutdown``, also at exit, kills every child of this process, sandbox workers included. Here SGLang's alone.
"""

from __future__ import annotations

import asyncio
import atexit
import copy
import logging
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from arft_fast.policy.model import Policy
from arft_fast.rollout.engine import EngineError

_SPARE_TOKENS = 8  # SGLang shortens turns that come within 2 tokens of its longest sequence
# torchrun's description of our own process group: SGLang's would wait for it, and never meet.
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True, eq=False)
class Launched:
    """A running engine and what has to go with it."""

    engine: Any
    """``sglang.Engine``; its ``tokenizer_manager`` takes requests."""
    children: Sequence[Any]
    """The processes that it started, as ``multiprocessing.Process``."""
    folder: tempfile.TemporaryDirectory[str]
    """What it was loaded from, and its sockets."""

    def end(self) -> None:
        """Kill the children with their own children, wait for them, remove the folder. Blocks for up to seconds."""
        atexit.unregister(self.engine.shutdown)
        _kill(self.children)
        self.folder.cleanup()


def start_engine(policy: Policy, arguments: Mapping[str, Any], environment: Mapping[str, str]) -> Launched:
    """Start SGLang with a model folder of ``policy`` that holds no weights. Blocks for half a minute and more.

    Args:
        arguments: SGLang's ``ServerArgs`` by name, without ``model_path``.
        environment: variables for its processes.

    Raises:
        EngineError: SGLang is not installed, or does not start; or this is not the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        raise EngineError("SGLang's processes report failures by a signal: launch it on the main thread")
    folder = tempfile.TemporaryDirectory(prefix="arft-sglang-")
    handler = signal.getsignal(signal.SIGQUIT)
    before = set(multiprocessing.active_children())
    engine: Any = None
    try:
        _write_shell(policy, Path(folder.name))
        with _contained(environment, folder.name):
            engine_class = _import_engine()
            engine = engine_class.__new__(engine_class)  # known even when it fails to start, for its hook at exit
            engine.__init__(model_path=folder.name, custom_sigquit_handler=_on_launch_sigquit, **arguments)
        return Launched(
            engine=engine, children=list(set(multiprocessing.active_children()) - before), folder=folder
        )  # fmt: skip
    except BaseException as error:
        if engine is not None:
            atexit.unregister(engine.shutdown)
            _kill(list(set(multiprocessing.active_children()) - before))
        folder.cleanup()
        if isinstance(error, EngineError) or not isinstance(error, Exception):
            raise
        raise EngineError(f"SGLang did not start ({error}); its own words stand above") from error
    finally:
        signal.signal(signal.SIGQUIT, handler)


def _on_launch_sigquit(number: int, frame: FrameType | None) -> None:
    """A child failed while starting: SGLang finds it gone and raises. A function of a module, as children get it."""


def _import_engine() -> Any:
    try:
        from sglang.srt.entrypoints.engine import Engine
    except ImportError as error:
        raise EngineError(f'rollout.engine sglang: {error}; pip install "arft_fast[sglang]"') from error
    return Engine


def server_args(policy: Policy, *, slots: int, max_tokens: int, memory_fraction: float) -> dict[str, Any]:
    """SGLang's ``ServerArgs`` for the policy's device; see ``SglangProcess.launch``."""
    arguments: dict[str, Any] = {
        "load_format": "dummy",  # every weight comes from the trainer
        "dtype": str(policy.model.dtype).removeprefix("torch."),
        "context_length": max_tokens + _SPARE_TOKENS,
        "max_running_requests": slots,
        "grammar_backend": "none",
    }
    if policy.device.type == "cuda":
        return arguments | {
            "base_gpu_id": policy.device.index or 0,
            "mem_fraction_static": memory_fraction,
            "enable_memory_saver": True,
        }
    return arguments | {
        "device": "cpu",
        "attention_backend": "torch_native",
        "mm_attention_backend": "sdpa",
        "sampling_backend": "pytorch",
        "disable_cuda_graph": True,
        "disable_overlap_schedule": True,
        "max_total_tokens": (slots + 1) * (max_tokens + _SPARE_TOKENS),
    }


def environment(policy: Policy, trains_vision: bool) -> dict[str, str]:
    """What SGLang reads from the environment alone; see ``SglangProcess.launch``."""
    variables = {} if policy.device.type == "cuda" else {"SGLANG_USE_CPU_ENGINE": "1"}
    # Its cache of image features knows no weights: neither an update nor a flush clears it.
    return variables | ({"SGLANG_VLM_CACHE_SIZE_MB": "0"} if trains_vision else {})


def _write_shell(policy: Policy, folder: Path) -> None:
    """A model folder without weights."""
    config = copy.deepcopy(policy.model.config)
    config.architectures = [type(policy.model).__name__]
    config.dtype = policy.model.dtype
    config.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    policy.images.processor.save_pretrained(folder)


@contextmanager
def _contained(environment: Mapping[str, str], scratch: str) -> Iterator[None]:
    """What SGLang's import and launch change in this process lasts until the end of the block.

    Args:
        environment: added for the block, without torchrun's description of this process.
        scratch: where its temporary files go (its sockets among them).
    """
    variables, loop_policy = dict(os.environ), asyncio.get_event_loop_policy()
    start_method = multiprocessing.get_start_method(allow_none=True)
    root, temporary = logging.getLogger(), tempfile.tempdir
    handlers, level = root.handlers[:], root.level
    launcher = logging.getLogger("sglang.srt.entrypoints.engine")
    root.handlers.clear()  # SGLang would close them
    launcher.addFilter(_not_of_the_handler)
    for name in [name for name in variables if name in _TORCHRUN or name.startswith("TORCHELASTIC_")]:
        del os.environ[name]
    os.environ.update(environment)
    tempfile.tempdir = scratch
    try:
        yield
    finally:
        tempfile.tempdir = temporary
        os.environ.clear()
        os.environ.update(variables)
        launcher.removeFilter(_not_of_the_handler)
        root.handlers[:] = handlers
        root.setLevel(level)
        multiprocessing.set_start_method(start_method, force=True)
        asyncio.set_event_loop_policy(loop_policy)


def _not_of_the_handler(record: logging.LogRecord) -> bool:
    """SGLang reports our handler of SIGQUIT as an error."""
    return "custom SIGQUIT handler" not in record.getMessage()


def _kill(children: Sequence[Any]) -> None:
    from sglang.srt.utils import kill_process_tree

    for child in children:
        kill_process_tree(child.pid, wait_timeout=10)
        child.join(timeout=5)
