"""The README's examples run, in order, on a tiny data set.

The data set is YOLO's, with the splits train and val. Nothing is downloaded, and trainings are cut to a few steps. YAML
blocks are written to the file that their first line names; in bash blocks the commands of `sniper` are run; Python
blocks are executed. A block after the comment `<!-- not run -->` is left out.
"""

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import sniper
from sniper.cli import run
from sniper.config.loading import load_partial
from sniper.pipeline import train
from tests.data.tiny import write_dataset

README = Path(__file__).parents[1] / "README.md"
SKIPPED = "<!-- not run -->"
SHELLS = ("", "bash", "console", "sh")
SMALLER = {
    "data": {"num_workers": 0},
    "model": {
        "backbone": {"name": "test_resnet", "pretrained": False},
        "rpn": {"channels": 16, "post_nms_top_n_train": 20, "post_nms_top_n": 20},
        "roi_head": {"channels": 8, "hidden_dim": 32},
    },
    "train": {"batch_size": 4, "epochs": 1},
}
"""What a test changes in a configuration of the README: nothing is downloaded, and a few steps are enough."""

SMALLER_FILE = "smaller.yaml"


@dataclass(frozen=True)
class Block:
    """A fenced block of a Markdown file."""

    language: str
    text: str
    line: int


def find_blocks(text: str) -> list[Block]:
    """Find the fenced blocks that are to be run."""
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [
        Block(language=match[1], text=match[2], line=text.count("\n", 0, match.start()) + 1)
        for match in fence.finditer(text)
        if not text[: match.start()].rstrip().endswith(SKIPPED)
    ]


def read_commands(block: Block) -> list[list[str]]:
    """Read the arguments of the commands of `sniper` in a block for a shell."""
    lines = block.text.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    return [command[1:] for command in commands if command[:1] == ["sniper"]]


def merge(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Put changes over values, section by section."""
    return values | {
        name: merge(values.get(name, {}), change) if isinstance(change, dict) else change
        for name, change in changes.items()
    }


def write_configuration(block: Block) -> None:
    """Write the configuration of a block, made smaller, once it has been loaded as it is."""
    path = Path(block.text.partition("\n")[0].removeprefix("#").split(";")[0].strip())
    assert path.suffix == ".yaml", f"line {block.line}: the first line of a YAML block must name its file"
    path.write_text(block.text)
    load_partial(path)
    path.write_text(yaml.safe_dump(merge(yaml.safe_load(block.text), SMALLER)))


def write_yolo(folder: Path) -> None:
    """Write a data set with the splits train and val, and `data.yaml`, into a folder."""
    for split in ("train", "val"):
        write_dataset(folder / "coco" / split, name=split).rename(
            folder / "coco" / split / "_annotations.coco.json"
        )
    assert run(["convert", str(folder / "coco"), str(folder / "yolo"), "--to", "yolo"]) == 0
    shutil.copytree(folder / "yolo", folder, dirs_exist_ok=True)


def make_smaller(arguments: list[str]) -> list[str]:
    """Add a configuration that trains in a second to a training without one."""
    if arguments[0] != "train" or "--config" in arguments:
        return arguments
    return [*arguments, "--config", SMALLER_FILE]


def train_smaller(source: str, *, epochs: float, **arguments: Any) -> Any:
    """Train in a second, in place of `sniper.train`."""
    assert epochs > 0
    return train(source, config=SMALLER_FILE, **arguments)


def test_the_readmes_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_yolo(tmp_path)
    Path(SMALLER_FILE).write_text(json.dumps(SMALLER))
    monkeypatch.setattr(sniper, "train", train_smaller, raising=False)
    num_run = 0
    for block in find_blocks(README.read_text()):
        where = f"README.md, block in line {block.line}"
        if block.language == "yaml":
            write_configuration(block)
        elif block.language == "python":
            exec(compile(block.text, where, "exec"), {"__name__": "__main__"})
            num_run += 1
        elif block.language in SHELLS:
            for arguments in read_commands(block):
                assert run(make_smaller(arguments)) == 0, f"{where}: {arguments}\n{capsys.readouterr().err}"
                num_run += 1
    assert num_run > 0


def test_blocks_of_shells_give_the_commands_of_sniper() -> None:
    text = (
        "```bash\npip install sniper-det\n$ sniper plan a.json  # why\nsniper train b.yaml \\\n    --run c\n```\n"
        f"{SKIPPED}\n```bash\nsniper demo\n```\n"
    )
    (block,) = find_blocks(text)
    assert read_commands(block) == [["plan", "a.json"], ["train", "b.yaml", "--run", "c"]]
