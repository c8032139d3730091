"""What commands print is text: no markup, no control characters, nothing that cannot be encoded."""

import subprocess
import sys
from pathlib import Path

import numba
import pytest

from sniper.cli.output import (
    announce_compilation,
    print_error,
    print_progress,
    print_result,
    print_warnings,
)
from tests.cli.commands import SNIPER

HOSTILE = "\x1b]0;title\x07[red]x[/red][/]:car:\x9b1m\udcb2\r\u202e"
SHOWN = r"\x1b]0;title\x07[red]x[/red][/]:car:\x9b1m\xb2\x0d\u202e"


def test_hostile_names_are_shown_in_results_errors_warnings_and_progress(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_result({"output": HOSTILE}, is_json=False)
    print_error(HOSTILE)
    print_warnings([HOSTILE])
    print_progress(HOSTILE)
    printed = capsys.readouterr()
    assert printed.out == f"output  {SHOWN}\n"
    assert printed.err == f"error: {SHOWN}\nwarning: {SHOWN}\n{SHOWN}\n"


def test_json_is_exact(capsys: pytest.CaptureFixture[str]) -> None:
    print_result({"output": HOSTILE}, is_json=True)
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert "\\u001b" in printed
    assert "\x1b" not in printed


@pytest.mark.parametrize("is_shown", [True, False])
def test_compilation_is_announced_once(capsys: pytest.CaptureFixture[str], is_shown: bool) -> None:
    with announce_compilation(is_shown=is_shown):
        for number in range(2):
            numba.njit(lambda value, number=number: value + number)(1)
    assert capsys.readouterr().err.count("compiling kernels") == int(is_shown)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_the_command_names_files_that_its_terminal_cannot_show(tmp_path: Path, encoding: str) -> None:
    done = subprocess.run(
        [SNIPER, "check", tmp_path / "图\x1b\udcb2[/].json"],
        capture_output=True,
        check=False,
        env={"PYTHONIOENCODING": encoding, "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert b"\x1b" not in done.stderr
    assert rb"\x1b\xb2[/].json: " in done.stderr


def test_warnings_of_libraries_are_one_line(tmp_path: Path) -> None:
    code = (
        "import sys, warnings, sniper.cli; module = sys.modules['sniper.cli.main']; "
        "module.run = lambda _: warnings.warn('\\x1b[31m') or 0; module.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "warning: \\x1b[31m\n")
