"""How the tests call the native row kernels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from arft_fast.kernels import native, native_rows
from arft_fast.kernels.rows import Transform

from .row_truth import Case, Results

PLAIN = Transform()
CAPPED = Transform(temperature=0.8, softcap=5.0, logit_scale=1.5)
TRANSFORMS = (PLAIN, Transform(temperature=0.7, logit_scale=0.5), CAPPED)
ISAS = ("portable", "avx2", "avx512")


def nan_vectors(case: Case, count: int) -> list[Tensor]:
    """Outputs [C] full of NaN: what a kernel leaves out shows."""
    return [torch.full_like(case.vectors.scale, math.nan) for _ in range(count)]


def run(case: Case) -> Results:
    """All results; the gradient is written over a copy of the logits."""
    outputs, gradient = nan_vectors(case, 3), case.logits.clone()
    native_rows.policy(gradient, *case[1:], *outputs, gradient)
    return Results(*outputs, gradient)


@pytest.fixture
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Force an instruction set; skipped where the CPU lacks it."""
    wanted = str(request.param)
    if native.available() and ISAS.index(wanted) > ISAS.index(native_rows.isa()):
        pytest.skip(f"this CPU has no {wanted}")
    monkeypatch.setattr(native_rows, "_FORCED_ISA", ISAS.index(wanted))
    return wanted


every_isa = pytest.mark.parametrize("isa", ISAS, indirect=True)
