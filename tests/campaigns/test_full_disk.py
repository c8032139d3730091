"""Disks that are full at a random moment: each command names the file, keeps earlier output, and succeeds afterwards.

`SNIPER_TRIALS` is the number of trials of each command and kind of limit (2), `SNIPER_SEED` their seed (0). The
kinds are a limit of the size of files, and a small disk in memory, which only root can mount.
"""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

import pytest

from sniper.cli import run
from tests.campaigns.campaign import SEED, num_trials
from tests.data.tiny import write_dataset
from tests.limits import file_limit

pytestmark = pytest.mark.slow

NUM_TRIALS = num_trials(2)

_PAGE = 4096  # bytes; space on a small disk is counted in pages

Kind = Literal["size limit", "small disk"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command that writes below the folder `out`.

    Attributes:
        command: what is run.
        earlier: run before, so that `out` has output; empty for none.
        afterwards: run when the disk has space again.
        compared: patterns of the files that must then be as if the disk had never been full; without times in them.
    """

    command: str
    earlier: str = ""
    afterwards: str = ""
    compared: tuple[str, ...] = ("**/*",)

    @property
    def last(self) -> str:
        """The command that is run when the disk has space again."""
        return self.afterwards or self.command


CASES = {
    "chips": Case(
        command="chips train.json -o out/c.npz --seed 1", earlier="chips train.json -o out/c.npz --seed 2"
    ),
    "plan": Case(command="plan train.json -o out/plan --seed 1", earlier="plan test.json -o out/plan"),
    "evaluate": Case(
        command="evaluate d.json train.json -o out/scores", earlier="evaluate e.json train.json -o out/scores"
    ),
    "convert": Case(command="convert train.json out/data --to yolo"),
    "predict": Case(
        command="predict run images -o out/d.json --draw out/pictures",
        earlier="predict run images/train_0.png -o out/d.json --draw out/pictures",
        afterwards="predict run images -o out/d.json --draw out/pictures --resume",
        compared=("d.json", "pictures/*"),
    ),
    "mine": Case(command="mine run -o out/proposals", compared=("**/head.json",)),
    "train": Case(
        command="train experiment.yaml --run out/run",
        afterwards="train experiment.yaml --run out/run --resume",
        compared=("run/checkpoints/*/weights.safetensors", "run/checkpoints/*/optimizer.safetensors"),
    ),
}
"""One trial of the demo takes minutes: see `test_a_full_disk_stops_the_demo`."""


@pytest.fixture
def world(trained_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder, with a data set, an experiment, a trained run and detections."""
    monkeypatch.chdir(trained_folder)
    write_dataset(trained_folder, name="test", sides=((120, 90), (100, 100)))
    for name, score in (("d", 0.9), ("e", 0.1)):
        entry = f'{{"image_id": 1, "category_id": 10, "bbox": [1, 2, 30, 40], "score": {score}}}'
        (trained_folder / f"{name}.json").write_text(f"[{entry}]")
    return trained_folder


@pytest.mark.parametrize("kind", ["size limit", "small disk"])
@pytest.mark.parametrize("name", CASES)
def test_a_full_disk_is_named_and_nothing_is_lost(
    world: Path, capsys: pytest.CaptureFixture[str], name: str, kind: Kind
) -> None:
    case, random = CASES[name], Random(f"{SEED} {name} {kind}")
    Path("out").mkdir()
    if case.earlier:
        execute(case.earlier)
    earlier = read_all(Path("out"))
    execute(case.command)
    expected = read_all(Path("out"))
    compared = {path.relative_to("out") for pattern in case.compared for path in Path("out").glob(pattern)}
    outcomes = []
    for _ in range(NUM_TRIALS):
        shutil.rmtree("out")
        with ExitStack() as stack:
            grow = stack.enter_context(small_disk(earlier, expected, random=random, kind=kind))
            capsys.readouterr()
            code = run(case.command.split())
            printed = capsys.readouterr()
            outcomes.append(code)
            kept = read_all(Path("out"))
            grow()
            if code:
                assert_explained(code, printed.err)
                for path, content in earlier.items():
                    assert kept[path] in (content, expected[path]), path
                has_checkpoint = any(Path("out").glob("run/checkpoints/0*"))
                execute(case.last if name != "train" or has_checkpoint else case.command)
            actual = read_all(Path("out"))
            assert {path: actual[path] for path in compared if path in expected} == {
                path: expected[path] for path in compared if path in expected
            }
            assert not [path for path in actual if path.name.startswith((".unfinished", ".c.npz", ".plan"))]
    assert any(outcomes)


@pytest.mark.parametrize("kind", ["size limit", "small disk"])
def test_a_full_disk_stops_the_demo(world: Path, capsys: pytest.CaptureFixture[str], kind: Kind) -> None:
    random = Random(f"{SEED} demo {kind}")
    for _ in range(NUM_TRIALS):
        shutil.rmtree("out", ignore_errors=True)
        with limited(Path("out"), random.randrange(100_000), kind=kind):
            capsys.readouterr()
            code = run(["demo", "--run", "out/demo", "--quick"])
            assert_explained(code, capsys.readouterr().err)


def execute(command: str) -> None:
    assert run(command.split()) == 0, command


def assert_explained(code: int, printed: str) -> None:
    """Check that a command ended with one paragraph that names a file below `out`, the reason and a remedy."""
    assert code == 2
    assert "Traceback" not in printed
    *_, error = printed.strip().splitlines()
    assert error.startswith("error: ")
    assert "out" in error
    assert "File too large; raise the limit" in error or "No space left on device; free space" in error, error


def read_all(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def small_disk(
    earlier: dict[Path, bytes], expected: dict[Path, bytes], *, random: Random, kind: Kind
) -> Iterator["Grow"]:
    """Put earlier output on a disk that has space for a part of the largest file; yield what enlarges it."""
    largest = max(map(len, expected.values()))
    limit = random.randrange(largest)
    if kind == "small disk":
        limit = max(count_bytes(earlier) + limit // _PAGE * _PAGE, _PAGE)
    with limited(Path("out"), limit, kind=kind, content=earlier) as grow:
        yield grow


def count_bytes(content: dict[Path, bytes]) -> int:
    """Count the bytes that files take on a small disk, in whole pages."""
    return sum(-(-len(each) // _PAGE) * _PAGE for each in content.values())


class Grow:
    """Removes a limit."""

    def __init__(self, stack: ExitStack, mounted: Path | None) -> None:
        self._stack, self._mounted = stack, mounted

    def __call__(self) -> None:
        if self._mounted is None:
            self._stack.close()
        else:
            subprocess.run(["mount", "-o", "remount,size=1g", self._mounted], check=True)


@contextmanager
def limited(
    folder: Path, limit: int, *, kind: Kind, content: dict[Path, bytes] | None = None
) -> Iterator[Grow]:
    """Create a folder with some content, in which a limited number of bytes can be written."""
    folder.mkdir()
    mounted = folder.absolute()
    with ExitStack() as stack:
        if kind == "small disk":
            options = f"size={-(-limit // _PAGE) * _PAGE}"
            done = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False
            )
            if done.returncode:
                pytest.skip("only root can mount a disk")
            stack.callback(lambda: subprocess.run(["umount", "-l", mounted], check=True))
        for path, data in (content or {}).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        limits = ExitStack()
        stack.enter_context(limits)
        if kind == "size limit":
            limits.enter_context(file_limit(limit))
        yield Grow(limits, folder.absolute() if kind == "small disk" else None)
