"""`sniper chips`: the table that it writes, and what it refuses."""

from pathlib import Path

import pytest

from tests.cli.commands import CommandLine


@pytest.mark.parametrize(
    ("annotations", "output", "message"),
    [
        ("none.json", "c.npz", "none.json: cannot be read"),
        ("broken.json", "c.npz", "broken.json: is not JSON"),
        ("train.json", "none/c.npz", "there is no folder"),
        ("train.json", ".", "Is a directory"),
    ],
)
def test_paths_that_cannot_be_used_are_refused(
    folder: Path, sniper: CommandLine, annotations: str, output: str, message: str
) -> None:
    (folder / "broken.json").write_text('{"images": [1, 2,, 3]}')
    assert message in sniper.error("chips", folder / annotations, "-o", folder / output)


def test_equal_seeds_write_equal_chips(folder: Path, sniper: CommandLine) -> None:
    config = ("--config", folder / "experiment.yaml", "--images", folder / "images")
    for name in ("a.npz", "b.npz"):
        sniper.json("chips", folder / "train.json", "-o", folder / name, "--seed", 7, *config)
    assert (folder / "a.npz").read_bytes() == (folder / "b.npz").read_bytes()
