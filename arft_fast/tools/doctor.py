"""What works here: each part is tried, not looked up. ``python -m arft_fast.tools doctor``.

Nothing is asked of the network. A key is looked for and never shown. torch, its GPUs and the native library are tried
in a process of their own: this one stays as light as the tools are.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

from PIL import Image

from arft_fast.tools.bounds import error_line
from arft_fast.tools.image_tools import image_tools
from arft_fast.tools.python_image_code import PythonImageCode
from arft_fast.tools.sandbox import Sandbox, SandboxRefused
from arft_fast.tools.sandbox.layers import STRICT, Mode
from arft_fast.tools.search import Passage
from arft_fast.tools.search_index import SearchIndex, build_index
from arft_fast.tools.search_tantivy import TantivyIndex, build_tantivy

KEYS = {"SERPER_API_KEY": "export the key of https://serper.dev in it to search with Google"}
_PACKAGES = ("numpy", "pillow", "requests", "transformers", "tokenizers")
_PASSAGES = [("Apple", "An apple is red."), ("Pear", "A pear is green.")]
_REINSTALL = "pip install arft_fast again"
_TORCH_S = 180.0
_CALL_S = 30.0
"""Deadline of the code that is tried: generous, for a busy machine is not a broken one."""

_CODE = """```python
from PIL import Image
Image.open('path_to_input_image.jpg').rotate(90, expand=True).save('path_to_output_image.jpg')
try:
    import cv2
    print(cv2.__version__)
except ImportError:
    pass
```"""
_TORCH = """
import json, torch
from arft_fast.kernels import group_advantage, native
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
names = [torch.cuda.get_device_name(i) for i in range(count)]
assert all(torch.ones(8, 8, device=f"cuda:{i}").sum().item() == 64 for i in range(count)), "a GPU cannot add"
fault = ""
try:
    group_advantage(torch.tensor([[0.0], [1.0]]), 2, impl="native")
except Exception as error:
    fault = f"{type(error).__name__}: {error}"
cuda = native.cuda_library_path() is not None
print(json.dumps({"torch": torch.__version__, "gpus": names, "native_fault": fault, "native_cuda": cuda}))
"""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the report."""

    name: str
    ok: bool
    needed: bool
    """Whether the defaults need it."""
    detail: str
    remedy: str = ""
    """What to do when it is not ok."""


def run_checks(environment: Mapping[str, str] = os.environ) -> list[Check]:
    """Every check, in the order of the report; none raises. Takes some seconds: sandboxes and torch are started."""
    return [
        *check_versions(),
        *check_sandbox(),
        attempt("image tools", _crop, needed=True, remedy=_REINSTALL),
        attempt("search: FTS5", _fts5, needed=True, remedy="use a Python whose sqlite3 has FTS5"),
        attempt("search: tantivy", _tantivy, needed=False, remedy='pip install "arft_fast[search]"; FTS5 serves else'),
        *check_keys(environment),
        *check_torch(),
    ]


def attempt(name: str, probe: Callable[[], str], *, needed: bool, remedy: str) -> Check:
    """``probe`` says what it found; an exception of it is what is wrong."""
    try:
        return Check(name=name, ok=True, needed=needed, detail=probe())
    except Exception as error:  # whatever is broken here is what this is for
        detail = error_line(f"{type(error).__name__}: {error}")
        return Check(name=name, ok=False, needed=needed, detail=detail, remedy=remedy)


def check_versions() -> list[Check]:
    """Python and the packages that every run needs."""
    python = Check(name="python", ok=True, needed=True, detail=f"{platform.python_version()} on {platform.platform()}")
    found = [
        attempt(package, partial(metadata.version, package), needed=True, remedy=f"pip install {package}")
        for package in _PACKAGES
    ]
    return [python, *found]


def check_sandbox() -> list[Check]:
    """A sandbox as a run starts it, its layers, and a call of the code tool in it."""
    try:
        try:
            active, seconds, opencv = asyncio.run(_use_sandbox("strict"))
        except SandboxRefused:  # what is there is worth a look all the same
            active, seconds, opencv = asyncio.run(_use_sandbox("best_effort"))
    except Exception as error:  # as in ``attempt``
        detail = error_line(f"{type(error).__name__}: {error}")
        return [Check(name="sandbox", ok=False, needed=True, detail=detail, remedy="use Linux with numpy and Pillow")]
    checks = [
        Check(name=f"sandbox: {layer}", ok=True, needed=True, detail="active")
        if layer in active
        else Check(name=f"sandbox: {layer}", ok=False, needed=True, detail="refused here", remedy=remedy)
        for layer, remedy in STRICT.items()
    ]
    others = [layer for layer in active if layer not in STRICT]
    checks.append(Check(name="sandbox: more layers", ok=True, needed=False, detail=", ".join(others)))
    checks.append(
        Check(name="code tool", ok=True, needed=True, detail=f"an image came back in {seconds * 1000:.0f} ms")
    )
    detail = opencv or "model code cannot import cv2"
    remedy = "pip install opencv-python-headless"
    checks.append(Check(name="sandbox: OpenCV", ok=bool(opencv), needed=False, detail=detail, remedy=remedy))
    return checks


def check_keys(environment: Mapping[str, str]) -> list[Check]:
    """Which keys are set. Their values show nowhere, and whether a service takes them is not asked."""
    checks = []
    for name, remedy in KEYS.items():
        found = bool(environment.get(name, "").strip())
        detail = "set" if found else "not set"
        checks.append(Check(name=f"key {name}", ok=found, needed=False, detail=detail, remedy=remedy))
    return checks


def check_torch() -> list[Check]:
    """torch, its GPUs and the native library, tried in a process of their own."""
    command = [sys.executable, "-c", _TORCH]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TORCH_S, stdin=subprocess.DEVNULL)
        lines = (done.stdout if done.returncode == 0 else done.stderr).splitlines() or [f"status {done.returncode}"]
        found = json.loads(lines[-1]) if done.returncode == 0 else None
    except (subprocess.TimeoutExpired, OSError, ValueError) as error:
        found, lines = None, [f"{type(error).__name__}: {error}"]
    if found is None:
        detail = error_line(lines[-1])
        return [Check(name="torch", ok=False, needed=True, detail=detail, remedy="install torch 2.11 or newer")]
    gpus, fault = found["gpus"], found["native_fault"]
    return [
        Check(name="torch", ok=True, needed=True, detail=found["torch"]),
        Check(
            name="GPU",
            ok=bool(gpus),
            needed=False,
            detail=", ".join(gpus) or "torch finds none",
            remedy="install a CUDA build of torch and the driver, or stay with --policy.device cpu",
        ),
        Check(
            name="native library",
            ok=not fault,
            needed=False,
            detail=error_line(fault) or "computes",
            remedy="build it with pip install . from the source tree; slower code serves else",
        ),
        Check(
            name="native CUDA library",
            ok=found["native_cuda"],
            needed=False,
            detail="built" if found["native_cuda"] else "not built",
            remedy="build on a machine with nvcc; other kernels serve else",
        ),
    ]


def report(checks: Sequence[Check]) -> str:
    """A line for each check, and one about the defaults."""
    width = max(len(check.name) for check in checks)
    lines = [f"{_status(check):<8} {check.name:<{width}}  {_explained(check)}" for check in checks]
    broken = [check.name for check in checks if check.needed and not check.ok]
    verdict = f"The defaults do not work here: {', '.join(broken)}." if broken else "The defaults work here."
    return "\n".join([*lines, verdict])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; returns the exit status: 0 when all that the defaults need is ok, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m arft_fast.tools doctor", description="Try what the tools need.")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    as_json = parser.parse_args(arguments).json
    checks = run_checks()
    ok = all(check.ok for check in checks if check.needed)
    print(
        json.dumps({"ok": ok, "checks": [asdict(check) for check in checks]}, indent=1) if as_json else report(checks)
    )
    return 0 if ok else 1


def _status(check: Check) -> str:
    return "ok" if check.ok else "missing"


def _explained(check: Check) -> str:
    if check.ok:
        return check.detail
    return f"{check.detail}{'' if check.needed else ' (optional)'}; {check.remedy}"


async def _use_sandbox(mode: Mode) -> tuple[Sequence[str], float, str]:
    """Active layers, seconds of a call of the code tool, and the version of OpenCV in there, empty without it."""
    sandbox = Sandbox(workers=1, timeout_s=_CALL_S, mode=mode)
    tool = PythonImageCode(sandbox)
    try:
        await tool.start()
        result = await tool.call(_CODE, Image.new("RGB", (64, 32)))
    finally:
        await tool.close()
    if result.error is not None or [image.size for image in result.images] != [(32, 64)]:
        raise RuntimeError(f"the code tool gave {result.error or 'another image than it should'}")
    return sandbox.layers, result.seconds, result.text.strip()


def _crop() -> str:
    tools = {tool.name: tool for tool in image_tools()}
    result = asyncio.run(tools["crop"].call('{"box": [0, 0, 500, 1000]}', Image.new("RGB", (64, 32))))
    if [image.size for image in result.images] != [(32, 32)]:
        raise RuntimeError(f"crop gave {result.error or 'another image than it should'}")
    return ", ".join(tools)


def _fts5() -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.sqlite"
        build_index(path, _PASSAGES)
        index = SearchIndex(path)
        try:
            _expect(index.search("red"))
        finally:
            index.close()
    return f"SQLite {sqlite3.sqlite_version}"


def _tantivy() -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        build_tantivy(path, _PASSAGES)
        index = TantivyIndex(path)
        try:
            _expect(index.search("red"))
        finally:
            index.close()
    return metadata.version("tantivy")


def _expect(found: Sequence[Passage]) -> None:
    if [passage.title for passage in found] != ["Apple"]:
        raise RuntimeError(f"a search for red found {[passage.title for passage in found]}, not Apple")
