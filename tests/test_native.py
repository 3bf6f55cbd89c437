"""The native library: built by the install, found, of the right version, and strict at its boundary."""

import ctypes
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import arft_fast
from arft_fast.kernels import native
from arft_fast.kernels.group_advantage_reference import Normalization

ROOT = Path(__file__).parent.parent


def installed():
    try:
        return importlib.metadata.version("arft_fast")
    except importlib.metadata.PackageNotFoundError:
        return None


from_build = pytest.mark.skipif(installed() is None, reason="arft_fast is imported from a folder, not installed")


@from_build
def test_an_installed_package_has_its_library():
    path = native.library_path()
    assert native.available() and path is not None and path.is_file()


@from_build
def test_the_version_is_the_same_in_package_and_metadata():
    assert installed() == arft_fast.__version__


@from_build
def test_header_library_and_binding_have_one_abi_version():
    header = re.search(r"#define ARFT_ABI_VERSION (\d+)", (ROOT / "csrc" / "arft.h").read_text())
    library = ctypes.CDLL(str(native.library_path()))
    assert header and int(header[1]) == native.ABI_VERSION == library.arft_abi_version()


@from_build
def test_the_library_needs_neither_torch_nor_python():
    """Loads in an interpreter that has imported nothing but ctypes."""
    script = f"import ctypes, sys; ctypes.CDLL({str(native.library_path())!r}).arft_abi_version(); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True)
    assert "torch" not in run.stdout.split()


@from_build
def test_a_stale_library_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    native._library.cache_clear()
    with pytest.raises(RuntimeError, match=r"ABI version .*rebuild it with `pip install"):
        native._library()


def test_a_missing_library_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(native, "library_path", lambda: None)
    native._library.cache_clear()
    with pytest.raises(RuntimeError, match=r"is not built; build it with .* or pass impl='reference'"):
        arft_fast.group_advantage(torch.zeros(2), 2, impl="native")
    assert arft_fast.kernels.group_advantage_impl(torch.zeros(2)) == "reference"


@pytest.fixture
def call():
    """``arft_group_advantage_f32`` on two rows in one group, any argument or setting replaceable."""
    if not native.available():
        pytest.skip("not built")
    native._library.cache_clear()
    inputs = torch.tensor([0.0, 1.0]), torch.tensor([0, 2])  # named: the call sees addresses only
    outs = [torch.full((2,), 7.0), torch.full((1,), 7.0), torch.full((1,), 7.0), torch.zeros(1, dtype=torch.bool)]
    scratch = torch.empty(2, dtype=torch.float64)
    settings = {"center": 1, "scale": 1, "order": 0, "whiten": 0, "std_floor": 0.0, "epsilon": 1e-4}
    arguments = {
        "rewards": inputs[0].data_ptr(),
        "weights": None,
        "gate_by": None,
        "gate_threshold": None,
        "offsets": inputs[1].data_ptr(),
        "rows": 2,
        "components": 1,
        "groups": 1,
        "rule": None,
        "scratch": scratch.data_ptr(),
        **{name: out.data_ptr() for name, out in zip(("advantages", "mean", "std", "no_signal"), outs, strict=True)},
    }

    def run(**change):
        rule = native._Normalization(**settings | {name: change.pop(name) for name in list(change) if name in settings})
        return native._library().arft_group_advantage_f32(*(arguments | {"rule": rule} | change).values()), outs

    yield run
    assert inputs[0].tolist() == [0.0, 1.0] and inputs[1].tolist() == [0, 2]  # never written to


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"rewards": None}, 1),
        ({"offsets": None}, 1),
        ({"rule": None}, 1),
        ({"scratch": None}, 1),
        ({"advantages": None}, 1),
        ({"mean": None}, 1),
        ({"std": None}, 1),
        ({"no_signal": None}, 1),
        ({"rows": -1}, 2),
        ({"components": 0}, 2),
        ({"groups": -1}, 2),
        ({"rows": 3}, 3),
        ({"groups": 0}, 3),
        ({"center": 3}, 4),
        ({"center": -1}, 4),
        ({"scale": 3}, 4),
        ({"scale": -1}, 4),
        ({"order": 2}, 4),
        ({"order": -1}, 4),
        ({"std_floor": -0.5}, 4),
        ({"std_floor": float("nan")}, 4),
        ({"std_floor": float("inf")}, 4),
        ({"epsilon": 0.0}, 5),
        ({"epsilon": float("nan")}, 5),
        ({"epsilon": float("inf")}, 5),
    ],
)
def test_a_bad_argument_returns_its_status_and_writes_nothing(call, change, status):
    code, outs = call(**change)
    assert code == status and code in native._ERRORS
    assert all((out == 7.0).all() for out in outs[:3])


def test_offsets_that_decrease_are_refused(call):
    offsets = torch.tensor([0, 5, 2])
    room = torch.zeros(2)
    flags = torch.zeros(2, dtype=torch.bool)
    change = {"groups": 2, "mean": room.data_ptr(), "std": room.data_ptr(), "no_signal": flags.data_ptr()}
    assert call(offsets=offsets.data_ptr(), **change)[0] == 3


@pytest.mark.parametrize(("by", "status"), [(-2, 12), (-1, 0), (0, 0), (1, 12)])
def test_a_gate_must_be_a_component(call, by, status):
    gate, threshold = torch.tensor([by]), torch.tensor([0.5])
    code, outs = call(gate_by=gate.data_ptr(), gate_threshold=threshold.data_ptr())
    assert code == status and code in {0, *native._ERRORS}
    assert (outs[0] == 7.0).all() == (status != 0)


def test_a_gate_without_thresholds_is_refused(call):
    gate = torch.tensor([0])
    assert call(gate_by=gate.data_ptr())[0] == 1


def test_good_arguments_return_zero(call):
    code, outs = call()
    assert code == 0 and outs[0][0] == -outs[0][1] and outs[1].item() == 0.5


def test_a_refusal_becomes_an_error_that_says_what_was_wrong(call):
    with pytest.raises(RuntimeError, match="offsets do not rise"):
        native.group_advantage(torch.zeros(2, 1), torch.tensor([0, 3]), None, Normalization())


@pytest.mark.parametrize("name", ["group_advantage", "linear_logprob", "policy_loss"])
def test_the_package_exports_the_kernels(name):
    assert getattr(arft_fast, name) is getattr(arft_fast.kernels, name) and name in dir(arft_fast)


def test_an_unknown_export_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'policy_los'"):
        _ = arft_fast.policy_los


def test_importing_the_package_imports_no_torch():
    script = "import sys, arft_fast; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "arft_fast" in run.stdout.split() and "torch" not in run.stdout.split()
