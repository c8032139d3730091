"""Errors of the operating system end every command in one paragraph with the file and what to do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sniper.cli import run
from tests.cli.commands import SNIPER, CommandLine
from tests.limits import file_limit

LIMIT = 60  # bytes: less than any file of ours has


@pytest.mark.parametrize(
    ("command", "path"),
    [
        ("chips train.json -o c.npz", "c.npz"),
        ("plan train.json -o plan", "plan/plan.html"),
        ("evaluate d.json train.json -o scores", "scores/scores.json"),
        ("evaluate d.json train.json --curve curve.svg", "curve.svg"),
        ("evaluate d.json train.json --curve curve.png", "curve.png"),
        ("convert train.json out --to yolo --images none", "out/"),
        ("convert train.json out --to coco --images none", "out/annotations/instances.json"),
        ("convert train.json out --to voc", "images/train_0.png: cannot be written to "),
        ("train experiment.yaml --run new", "new/config.yaml"),
        ("predict run -o found.json", "/"),
        ("predict run -o found.json --draw pictures --min-score 0.3", "/"),
        ("mine run -o store", "store/head.json"),
        ("demo --run demo", "demo/config.yaml"),
    ],
)
def test_a_disk_that_is_full_is_named(
    trained_folder: Path, monkeypatch: pytest.MonkeyPatch, sniper: CommandLine, command: str, path: str
) -> None:
    monkeypatch.chdir(trained_folder)
    Path("d.json").write_text("[]")
    with file_limit(LIMIT):
        message = sniper.error(*command.split())
    assert path in message
    assert (
        "File too large; raise the limit of file sizes (ulimit -f), or use a folder on another disk"
        in message
    )
    assert not [each for each in Path().rglob("*") if each.name.startswith(".c.npz")]
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("chips train.json -o file/c.npz", "file"),
        ("plan train.json -o file/plan", "file/plan: Not a directory; a part of the path is a file"),
        ("plan train.json -o file", "file: File exists; choose another name, or remove it"),
        ("evaluate d.json train.json -o file", "file: File exists; choose another name, or remove it"),
        ("evaluate d.json train.json -o NAME", "File name too long; choose shorter names"),
        ("convert train.json NAME --to coco", "File name too long; choose shorter names"),
        ("train experiment.yaml --run file/run", "file/run"),
        ("predict run -o file/found.json", "file"),
        ("predict run -o found.json --draw file", "file: File exists; choose another name, or remove it"),
        ("mine run -o file", "file: is a file, expected a folder"),
        ("demo --run file", "file"),
    ],
)
def test_a_path_that_cannot_be_created_is_named(
    trained_folder: Path, monkeypatch: pytest.MonkeyPatch, sniper: CommandLine, command: str, message: str
) -> None:
    monkeypatch.chdir(trained_folder)
    Path("d.json").write_text("[]")
    Path("file").write_text("")
    assert message in sniper.error(*command.replace("NAME", "a" * 300).split())
    assert Path("file").read_text() == ""


def test_too_many_open_files_are_explained(
    trained_folder: Path, monkeypatch: pytest.MonkeyPatch, sniper: CommandLine
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files", "images/train_0.png")

    monkeypatch.setattr("sniper.cli.chips.load_annotations", fail)
    message = sniper.error("chips", trained_folder / "train.json", "-o", trained_folder / "c.npz")
    assert "images/train_0.png: Too many open files; raise the limit of open files (ulimit -n)" in message


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError("Unable to allocate 7 GiB"), "there is not enough memory (Unable to allocate 7 GiB)"),
        (MemoryError(), "there is not enough memory (no details)"),
        (
            RuntimeError("unable to write to file </torch_1>: No space left on device (28)"),
            "/dev/shm: unable",
        ),
    ],
)
def test_a_lack_of_memory_is_explained(
    trained_folder: Path, monkeypatch: pytest.MonkeyPatch, sniper: CommandLine, error: Exception, message: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("sniper.cli.chips.load_annotations", fail)
    assert message in sniper.error("chips", trained_folder / "train.json", "-o", trained_folder / "c.npz")


def test_a_fault_of_torch_keeps_its_traceback(trained_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr("sniper.cli.chips.load_annotations", fail)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(["chips", str(trained_folder / "train.json"), "-o", "c.npz"])


@pytest.mark.parametrize("arguments", ["recipes", "recipes --json"])
def test_standard_output_on_a_full_disk_is_named(arguments: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [SNIPER, *arguments.split()], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: standard output: No space left on device; free space on its disk")


def test_kernels_that_cannot_be_kept_are_used(tmp_path: Path) -> None:
    script = """
import resource
from sniper.geometry.kernels import kernel
@kernel
def double(number):
    return 2 * number
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
print(double(21))
"""
    path = tmp_path / "kernels.py"
    path.write_text(script)
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("42\n", "")
