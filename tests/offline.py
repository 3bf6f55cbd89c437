"""Compile what a launcher launches, for GPUs that are not here: real arguments, real specialisation, no launch.

``python -m tests.offline tests.test_triton_compile 90`` prints what came of each case of that module's ``CASES`` (a
mapping from names to functions that launch kernels on CPU tensors) for compute capability 9.0. It needs a process in
which Triton does not interpret, so tests go through ``compile_cases``.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}
"""What a program may have of shared memory, by compute capability (CUDA C++ Programming Guide)."""

REGISTERS = 65_536
"""Of a multiprocessor, on all of them."""


@dataclass(frozen=True)
class Built:
    """A compiled kernel."""

    kernel: str
    warps: int
    registers: int
    """Per thread."""
    stack: int
    """Bytes per thread: registers that were spilled."""
    shared: int
    """Bytes."""
    memory: str
    """Accesses to global memory in the order of the PTX: W loads 16 bytes, w fewer, S stores, | is a barrier."""


def problems(built: Built, architecture: int) -> list[str]:
    """Why the kernel would not run there, or not run well."""
    found = []
    if built.stack:
        found.append(f"spills {built.stack} bytes a thread")
    if built.registers * 32 * built.warps > REGISTERS:
        found.append(f"{built.registers} registers in {32 * built.warps} threads do not fit a multiprocessor")
    if built.shared > SHARED_BYTES[architecture]:
        found.append(f"{built.shared} bytes of shared memory, {SHARED_BYTES[architecture]} are there")
    return found


def compile_cases(module: str, architecture: int) -> dict[str, list[Built]]:
    """The kernels that each of ``module.CASES`` launches, compiled in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-m", __name__, module, str(architecture)],
            cwd=Path(__file__).parent.parent,
            env=environment | {"TRITON_CACHE_DIR": cache},
            capture_output=True,
            text=True,
        )
    if done.returncode != 0:
        raise RuntimeError(f"compiling {module} for {architecture} failed:\n{done.stderr}")
    return {name: [Built(**entry) for entry in entries] for name, entries in json.loads(done.stdout).items()}


def _compile(cases: Mapping[str, Callable[[], None]], architecture: int) -> dict[str, list[Built]]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Driver:
        """All of a driver that compiling asks for."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", architecture, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    compiled: list[Any] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append(launch(self, *args, grid=grid, warmup=True, **kwargs))
        return compiled[-1]

    triton.runtime.driver.set_active(Driver())
    JITFunction.run = compile_only
    results = {}
    for name, case in cases.items():
        compiled.clear()
        case()
        results[name] = [_describe(kernel) for kernel in compiled]
    return results


def _describe(kernel: Any) -> Built:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    accesses = re.findall(r"\b(?:(ld|st)\.global\S*?(\.v\d)?\.[bf](\d+)\b|(bar\.sync))", kernel.asm["ptx"])
    return Built(
        kernel=kernel.name,
        warps=kernel.metadata.num_warps,
        registers=used["REG"],
        stack=used["STACK"],
        shared=kernel.metadata.shared,
        memory="".join(_letter(*access) for access in accesses),
    )


def _letter(access: str, vector: str, bits: str, barrier: str) -> str:
    if barrier:
        return "|"
    if access == "st":
        return "S"
    return "W" if int(vector.removeprefix(".v") or 1) * int(bits) == 128 else "w"


if __name__ == "__main__":
    built = _compile(importlib.import_module(sys.argv[1]).CASES, int(sys.argv[2]))
    print(json.dumps({name: [dataclasses.asdict(one) for one in found] for name, found in built.items()}))
