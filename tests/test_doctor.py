"""The doctor: what it says of a machine that works, of one that does not, and what it never says."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from arft_fast.tools import __main__ as command
from arft_fast.tools import doctor
from arft_fast.tools.doctor import Check
from arft_fast.tools.sandbox import Sandbox

NEEDED = Check(name="part", ok=False, needed=True, detail="gone", remedy="put it back")


def failed(checks: list[Check]) -> list[str]:
    return [check.name for check in checks if not check.ok]


def test_the_sandbox_is_started_and_used() -> None:
    checks = {check.name: check for check in doctor.check_sandbox()}
    assert checks["code tool"].ok and "an image came back" in checks["code tool"].detail
    assert {"sandbox: seccomp", "sandbox: landlock-files", "sandbox: OpenCV"} <= set(checks)


def test_a_layer_that_the_kernel_refuses_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sandbox, "_use", ("namespaces", "landlock"))
    checks = {check.name: check for check in doctor.check_sandbox()}
    refused = checks["sandbox: seccomp"]
    assert (refused.ok, refused.needed) == (False, True)
    assert "CONFIG_SECCOMP_FILTER" in refused.remedy
    assert checks["code tool"].ok, "what is there was tried all the same"


def test_a_sandbox_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "plan9")
    (check,) = doctor.check_sandbox()
    assert (check.ok, check.needed) == (False, True)
    assert "needs Linux, this is plan9" in check.detail and check.remedy


def test_both_searches_are_tried() -> None:
    assert doctor._fts5().startswith("SQLite 3.")
    pytest.importorskip("tantivy")
    assert doctor._tantivy()


def test_a_search_that_finds_nothing_is_not_ok() -> None:
    with pytest.raises(RuntimeError, match=r"found \[\], not Apple"):
        doctor._expect([])


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tantivy", None)
    check = doctor.attempt("search: tantivy", doctor._tantivy, needed=False, remedy="install it")
    assert not check.ok and "tantivy is not installed" in check.detail


def test_a_key_is_looked_for_and_never_shown() -> None:
    present = doctor.check_keys({"SERPER_API_KEY": "0123456789abcdef"})
    assert [check.ok for check in present] == [True]
    assert "0123456789abcdef" not in repr(present) + doctor.report(present)
    for environment in ({}, {"SERPER_API_KEY": " "}):
        (absent,) = doctor.check_keys(environment)
        assert (absent.ok, absent.needed, absent.detail) == (False, False, "not set")


def test_torch_and_the_native_library_are_tried() -> None:
    checks = {check.name: check for check in doctor.check_torch()}
    assert checks["torch"].ok
    assert set(checks) == {"torch", "GPU", "native library", "native CUDA library"}


@pytest.mark.parametrize(
    ("script", "detail"),
    [("import nowhere", "No module named 'nowhere'"), ("print('odd')", "JSONDecodeError"), ("1/0", "division by zero")],
)
def test_a_torch_that_breaks_is_named(monkeypatch: pytest.MonkeyPatch, script: str, detail: str) -> None:
    monkeypatch.setattr(doctor, "_TORCH", script)
    (check,) = doctor.check_torch()
    assert (check.ok, check.needed) == (False, True)
    assert detail in check.detail


def test_a_probe_that_raises_is_a_line_and_no_crash() -> None:
    check = doctor.attempt("part", lambda: str(1 / 0), needed=True, remedy="repair it")
    assert (check.ok, check.detail, check.remedy) == (False, "ZeroDivisionError: division by zero", "repair it")


def test_the_report_has_a_line_for_each_check_with_the_remedy() -> None:
    checks = [
        Check(name="a", ok=True, needed=True, detail="1.0", remedy="unseen"),
        NEEDED,
        Check(name="extra", ok=False, needed=False, detail="not set", remedy="set it"),
    ]
    assert doctor.report(checks).splitlines() == [
        "ok       a      1.0",
        "missing  part   gone; put it back",
        "missing  extra  not set (optional); set it",
        "The defaults do not work here: part.",
    ]


@pytest.mark.parametrize(("needed", "status"), [(True, 1), (False, 0)])
def test_the_exit_status_is_that_of_the_defaults(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], needed: bool, status: int
) -> None:
    lacking = Check(name="part", ok=False, needed=needed, detail="gone", remedy="put it back")
    monkeypatch.setattr(doctor, "run_checks", lambda: [lacking])
    assert command.main(["doctor", "--json"]) == status
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] == (status == 0)
    assert answer["checks"] == [
        {"name": "part", "ok": False, "needed": needed, "detail": "gone", "remedy": "put it back"}
    ]


def test_an_unknown_command_is_an_error_of_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["docter"]) == 2
    assert "usage: python -m arft_fast.tools doctor" in capsys.readouterr().err


@pytest.mark.slow  # starts torch and two processes; the parts are tested above
def test_the_command_works_on_this_machine() -> None:
    done = subprocess.run([sys.executable, "-m", "arft_fast.tools", "doctor"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("The defaults work here.\n")
