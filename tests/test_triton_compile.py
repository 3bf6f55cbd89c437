"""Every Triton kernel compiles for every GPU that we name, without spills; no GPU is needed.

``CASES`` calls the launchers as the vocabulary head does, on CPU tensors; what they launch is compiled instead of run.
Of the row kernel's settings some change the work on a tile (mode, dtypes, alignment, overlaid gradient, bias, softcap,
entropy bonus) and decide about registers; each of these comes in several cases. The rest of an objective (surrogate, KL
estimate, sampler correction, absent vectors) is scalar code that runs once a row, independent of the tile; each choice
comes in one case at least. ``pytest tests/test_triton_compile.py -s`` prints registers, stack and shared memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any
from unittest import mock

import pytest
import torch

from arft_fast.kernels import triton_rows, triton_support
from arft_fast.kernels.rows import RowObjective, Transform, Vectors

from .offline import SHARED_BYTES, Built, compile_cases, problems

pytestmark = pytest.mark.skipif(not triton_support.installed(), reason="triton is not installed")

FLOAT32, BFLOAT16, FLOAT64 = torch.float32, torch.bfloat16, torch.float64
SCALED = Transform(temperature=0.7)
CAPPED = Transform(temperature=0.7, softcap=30.0)
QWEN, GPT2 = 151_936, 50_257
"""Vocabularies: one whose rows start on 16 bytes, an odd one."""


def rows(
    mode: str,
    logits: torch.dtype,
    gradient: torch.dtype | None = None,
    *,
    vocabulary: int = QWEN,
    overlaid: bool = True,
    bias: bool = False,
    transform: Transform = SCALED,
    absent: tuple[str, ...] = (),
    **objective: Any,
) -> None:
    """Launch the row kernel on two rows; ``gradient``: its dtype, over the logits or in memory of its own."""
    statistics = torch.promote_types(logits, FLOAT32)
    x = torch.empty(2, vocabulary, dtype=logits)
    vector = torch.empty(2, dtype=statistics)
    common = (
        x,
        torch.zeros(2, dtype=torch.int64),
        torch.empty(vocabulary, dtype=statistics) if bias else None,
        transform,
    )
    if mode == "score":
        triton_rows.score(*common, vector, vector)
        return
    assert gradient is not None
    into = x.view(gradient)[:, :vocabulary] if overlaid else torch.empty(2, vocabulary, dtype=gradient)
    if mode == "gradients":
        triton_rows.gradients(*common, vector, vector if objective else None, into)
        return
    vectors = Vectors(**{name: None if name in absent else vector for name in Vectors._fields})
    triton_rows.policy(*common, RowObjective(**objective), vectors, vector, vector, vector, into)


def groups(components: int, dtype: torch.dtype = FLOAT32, **rule: Any) -> None:
    """Launch the kernels of ``group_advantage`` on two groups."""
    from arft_fast.kernels import triton_group_advantage
    from arft_fast.kernels.group_advantage_reference import Normalization

    rewards, weights = torch.empty(16, components, dtype=dtype), torch.empty(components, dtype=dtype)
    triton_group_advantage.group_advantage(rewards, torch.tensor([0, 8, 16]), weights, Normalization(**rule))


ON_POLICY = {"absent": ("old", "ref", "sampler")}
EVERYTHING = {"bias": True, "transform": CAPPED, "beta": 0.1, "entropy_coef": 0.01}
CASES: dict[str, Callable[[], None]] = {
    # What the head launches for a bfloat16 model: float32 logits, the gradient in bfloat16 over them.
    "score": partial(rows, "score", FLOAT32),
    "grpo, on-policy": partial(rows, "policy", FLOAT32, BFLOAT16, **ON_POLICY),
    "grpo, clipped, k3": partial(rows, "policy", FLOAT32, BFLOAT16, beta=0.1, sampler="mask", delta=4.0, dual_clip=3.0),
    "cispo, k1": partial(
        rows, "policy", FLOAT32, BFLOAT16, surrogate="cispo", kl="k1", sampler="truncate", **EVERYTHING
    ),
    "sapo, k2": partial(rows, "policy", FLOAT32, BFLOAT16, surrogate="sapo", kl="k2", kl_correction=True, **EVERYTHING),
    "gradients": partial(rows, "gradients", FLOAT32, BFLOAT16),
    "gradients, everything": partial(rows, "gradients", FLOAT32, BFLOAT16, **EVERYTHING),
    "beside the logits": partial(rows, "policy", FLOAT32, BFLOAT16, overlaid=False, **ON_POLICY),
    # For a float32 model, and for those who bring bfloat16 logits.
    "float32": partial(rows, "policy", FLOAT32, FLOAT32, kl_correction=True, **EVERYTHING),
    "bfloat16": partial(rows, "policy", BFLOAT16, BFLOAT16, **ON_POLICY),
    "bfloat16, everything": partial(rows, "policy", BFLOAT16, BFLOAT16, **EVERYTHING),
    "bfloat16, score": partial(rows, "score", BFLOAT16, bias=True, transform=CAPPED),
    # Rows that do not start on 16 bytes, a small vocabulary, float64.
    "odd": partial(rows, "policy", FLOAT32, BFLOAT16, vocabulary=GPT2, **EVERYTHING),
    "odd, bfloat16": partial(rows, "policy", BFLOAT16, BFLOAT16, vocabulary=GPT2, **EVERYTHING),
    "small": partial(rows, "policy", FLOAT32, BFLOAT16, vocabulary=1000, **EVERYTHING),
    "one id": partial(rows, "policy", FLOAT32, FLOAT32, vocabulary=1),
    "float64": partial(rows, "policy", FLOAT64, FLOAT64, **EVERYTHING),
    "groups": partial(groups, 1),
    "groups, batch": partial(groups, 3, scale="batch"),
    "groups, everything": partial(
        *(groups, 3, FLOAT64),
        **{"order": "normalize_then_sum", "whiten": True, "gate_by": (-1, 0, 0), "gate_threshold": (0.0, 0.5, 0.5)},
    ),
}


def four_times_the_logits_per_thread() -> None:
    with mock.patch.dict(triton_rows.TILES, {4: triton_rows.Tile(warps=32, rounds=16, vector=4)}):
        rows("policy", FLOAT32, BFLOAT16, **EVERYTHING)


CONTROL = "control: spills"
CASES[CONTROL] = four_times_the_logits_per_thread

every_architecture = pytest.mark.parametrize(
    "architecture", [pytest.param(a, marks=[] if a in (90, 120) else pytest.mark.slow) for a in SHARED_BYTES]
)


@cache
def build(architecture: int) -> dict[str, list[Built]]:
    built = compile_cases(__name__, architecture)
    for name, kernels in built.items():
        for k in kernels:
            used = f"{k.warps:2} warps {k.registers:3} registers {k.stack:3} B stack {k.shared:5} B shared"
            print(f"sm_{architecture:<4}{name:22} {k.kernel:17} {used}  {k.memory}")
    return built


@every_architecture
@pytest.mark.parametrize("case", [name for name in CASES if name != CONTROL])
def test_the_kernel_compiles_and_fits(case: str, architecture: int) -> None:
    kernels = build(architecture)[case]
    assert kernels, "nothing was launched"
    for kernel in kernels:
        assert not problems(kernel, architecture), kernel


@every_architecture
def test_a_kernel_that_spills_is_caught(architecture: int) -> None:
    (kernel,) = build(architecture)[CONTROL]
    assert any("spills" in problem for problem in problems(kernel, architecture))


def test_a_kernel_too_large_for_the_gpu_is_caught() -> None:
    fits = Built("kernel", warps=32, registers=64, stack=0, shared=101_376, memory="")
    assert not problems(fits, 120)
    assert problems(Built("kernel", warps=32, registers=65, stack=0, shared=0, memory=""), 120)
    assert problems(Built("kernel", warps=4, registers=64, stack=0, shared=101_377, memory=""), 120)
    assert not problems(Built("kernel", warps=4, registers=64, stack=0, shared=101_377, memory=""), 90)


@every_architecture
def test_aligned_rows_are_loaded_16_bytes_at_a_time(architecture: int) -> None:
    built = build(architecture)
    for case, loads in {"score": 4, "grpo, on-policy": 8, "bfloat16": 4, "cispo, k1": 16, "gradients": 8}.items():
        assert built[case][0].memory.count("W") == loads, (case, built[case][0].memory)
    for case in ("odd", "odd, bfloat16"):
        assert "W" not in built[case][0].memory, "what the count is worth"


@every_architecture
def test_a_gradient_over_the_logits_waits_for_all_loads_of_a_tile(architecture: int) -> None:
    """Loads of a tile, barrier, stores; beside the logits or at equal width there is nothing to wait for."""
    built = build(architecture)
    for case in ("grpo, on-policy", "gradients", "cispo, k1"):
        assert "WWWW|SSSS" in built[case][0].memory, built[case][0].memory
    assert "WWWWSSSS" in built["beside the logits"][0].memory
    assert "WWSS" in built["bfloat16"][0].memory
