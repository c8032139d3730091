"""The code blocks of the README and of the documentation run, page by page, on tiny data sets.

Python blocks are executed, and in bash blocks the commands of `sniper` are run; nothing is downloaded, and trainings
are cut to a few steps. YAML blocks are loaded as parts of an experiment, and written to the file that their first line
names. Blocks after the comment `<!-- not run -->`, and those of pages with `<!-- not run: all blocks of this page -->`,
are checked without running them: syntax, commands, options, fields and files of the repository.
"""

import ast
import itertools
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import yaml
from safetensors.torch import save_file
from torch.distributed.run import parse_args

import sniper
from sniper.cli import run
from sniper.cli.main import app
from sniper.cli.unknown import parse_overrides
from sniper.config.experiment import ExperimentSpec
from sniper.config.loading import is_experiment, load_partial, merge_experiment
from sniper.pipeline import train
from sniper.runs.default import default_run
from tests.data.tiny import write_dataset

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SKIPPED, SKIPPED_PAGE = "<!-- not run -->", "<!-- not run: all blocks of this page -->"
LANGUAGES = ("bash", "bibtex", "json", "python", "text", "yaml")
SLOW_PAGES = ("docs/first_hour.md", "docs/training.md")
"""Pages whose blocks train for more than ten seconds in all."""

SMALLER = {
    "data": {"num_workers": 0},
    "model": {
        "backbone": {"name": "test_resnet", "pretrained": False},
        "rpn": {"channels": 16, "post_nms_top_n_train": 20, "post_nms_top_n": 20},
        "roi_head": {"channels": 8, "hidden_dim": 32},
    },
    "train": {"batch_size": 4, "epochs": 1, "warmup_steps": 0},
}
"""What a test changes in a configuration of a page: nothing is downloaded, and a few steps are enough."""

SMALLER_TORCHVISION = {
    "data": {"num_workers": 0},
    "model": {
        "backbone": {"name": "test_resnet", "pretrained": False},
        "torchvision": {"channels": 64, "num_convs": 1, "detections_per_window": 20},
    },
    "train": {"batch_size": 4, "epochs": 1, "warmup_steps": 0},
}
"""The same for a detector of torchvision."""

SMALLER_FILE, SMALLER_TORCHVISION_FILE = "smaller.yaml", "smaller_torchvision.yaml"


@dataclass(frozen=True)
class Block:
    """A fenced block of a Markdown file.

    Attributes:
        language: of the fence.
        text: between the fences.
        line: of the opening fence, from 1.
        is_run: whether no comment says that it is not run.
    """

    language: str
    text: str
    line: int
    is_run: bool


def name_of(page: Path) -> str:
    """Return the path of a page in the repository."""
    return str(page.relative_to(ROOT))


def find_blocks(text: str) -> list[Block]:
    """Find the fenced blocks of a page."""
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [
        Block(
            language=match[1],
            text=match[2],
            line=text.count("\n", 0, match.start()) + 1,
            is_run=SKIPPED_PAGE not in text and not text[: match.start()].rstrip().endswith(SKIPPED),
        )
        for match in fence.finditer(text)
    ]


def is_redirection(token: str) -> bool:
    return token in ("<", ">", ">>")


def read_commands(block: Block) -> Iterator[list[str]]:
    """Read the commands of a block for a shell, without assignments, redirections and comments."""
    for line in block.text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command: list[str] = []
        before = ""
        for token in [*lexer, ";"]:
            if set(token) & set("();|&"):
                if command:
                    yield command
                command = []
            elif is_redirection(token) or is_redirection(before):
                pass  # with the file that it names
            elif command or not re.fullmatch(r"\w+=.*", token):
                command.append(token)
            before = token


def sniper_arguments(command: Sequence[str]) -> list[str] | None:
    """Return the arguments of a command of `sniper`, also where srun or torchrun starts it; None for others."""
    if command[0] == "srun":
        command = command[1:]
    if command[0] == "torchrun":
        options = parse_args(list(command[1:]))  # type: ignore[no-untyped-call]
        assert options.no_python or options.training_script.endswith(".py"), "torchrun needs --no-python here"
        command = [options.training_script, *options.training_script_args]
    return list(command[1:]) if command[0] == "sniper" else None


def check_arguments(arguments: Sequence[str]) -> None:
    """Check that a command of `sniper` exists, with all its options and fields."""
    given = [re.sub(r"\$\w+", "value", argument) for argument in arguments if not argument.startswith("${")]
    _, bound, _ = app.parse_args(given, exit_on_error=False, print_error=False)
    overrides = parse_overrides(bound.arguments.get("overrides", ()))
    merge_experiment(ExperimentSpec(), None, overrides=overrides)


def check_repository_command(command: Sequence[str]) -> None:
    """Check that the file of this repository which a command runs is there, with all its options."""
    paths = [ROOT / word for word in command if re.match(r"(benchmarks|script|tests|examples)/", word)]
    assert all(path.exists() for path in paths), command
    if any(path.parent.name == "benchmarks" for path in paths):
        sources = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
        options = {word.partition("=")[0] for word in command if word.startswith("--")}
        assert all(f'"{option}"' in sources for option in options), command


def check_block(block: Block, *, folder: Path) -> None:
    """Check a block without running it; the folder takes a file."""
    if block.language == "python":
        ast.parse(block.text)
    elif block.language == "json":
        json.loads(block.text)
    elif block.language == "yaml":
        (folder / "part.yaml").write_text(block.text)
        load_partial(folder / "part.yaml")
    elif block.language == "bash":
        subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
        for command in read_commands(block):
            arguments = sniper_arguments(command)
            if arguments is None:
                check_repository_command(command)
            else:
                check_arguments(arguments)


def merge(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Put changes over values, section by section."""
    return values | {
        name: merge(values.get(name, {}), change) if isinstance(change, dict) else change
        for name, change in changes.items()
    }


def write_configuration(block: Block) -> None:
    """Write a part of an experiment, made smaller, to the file that its first line names, if it names one."""
    path = Path(block.text.partition("\n")[0].removeprefix("#").split(";")[0].strip())
    if path.suffix == ".yaml":
        path.write_text(yaml.safe_dump(merge(yaml.safe_load(block.text), SMALLER)))


def is_new_training(arguments: Sequence[str]) -> bool:
    return arguments[0] == "train" and "--resume" not in arguments and "--help" not in arguments


def folder_of(arguments: Sequence[str]) -> Path:
    """Return the folder of the run that the arguments of a training name."""
    given = [value for name, value in itertools.pairwise(arguments) if name == "--run"]
    return Path(given[0]) if given else default_run(arguments[1])


def prepare_training(arguments: list[str]) -> list[str]:
    """Let a new training take a second, and make place for its run: the lines of a block may be alternatives."""
    if not is_new_training(arguments):
        return arguments
    shutil.rmtree(folder_of(arguments), ignore_errors=True)
    if "--time" in arguments:  # it would be measured
        index = arguments.index("--time")
        arguments = [*arguments[:index], *arguments[index + 2 :]]
    if "--config" in arguments or is_experiment(Path(arguments[1])):
        return arguments
    is_torchvision = "torchvision" in arguments
    return [*arguments, "--config", SMALLER_TORCHVISION_FILE if is_torchvision else SMALLER_FILE]


def train_smaller(source: str, *, run: Any = None, resume: bool = False, **arguments: Any) -> Any:
    """Train in a second, in place of `sniper.train`; see `prepare_training`."""
    if not resume:
        shutil.rmtree(default_run(source) if run is None else run, ignore_errors=True)
        if not is_experiment(Path(source)):
            kind = (arguments.get("overrides") or {}).get("model.kind")
            arguments["config"] = SMALLER_TORCHVISION_FILE if kind == "torchvision" else SMALLER_FILE
    return train(source, run=run, resume=resume, **arguments)


def run_blocks(page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> int:
    """Run the blocks of a page in order, in the current folder; return the number of commands and Python blocks."""
    monkeypatch.setattr(sniper, "train", train_smaller, raising=False)
    names: dict[str, Any] = {"__name__": "__main__", "sniper": sniper}
    num_run = 0
    for block in find_blocks(page.read_text()):
        where = f"{name_of(page)}, block in line {block.line}"
        if not block.is_run:
            continue
        if block.language == "yaml":
            write_configuration(block)
        elif block.language == "python":
            exec(compile(block.text, where, "exec"), names)
            num_run += 1
        elif block.language == "bash":
            for command in read_commands(block):
                assert command[0] == "sniper", f"{where}: {command} is not run; mark the block with {SKIPPED}"
                arguments = prepare_training(command[1:])
                assert run(arguments) == 0, f"{where}: {arguments}\n{capsys.readouterr().err}"
                num_run += 1
    return num_run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the pages name: data sets, images, detections, and a trained run."""
    folder = tmp_path_factory.mktemp("world")
    for split in ("train", "val"):
        annotations = write_dataset(folder / "coco" / split, name=split)
        annotations.rename(annotations.with_name("_annotations.coco.json"))
    assert run(["convert", str(folder / "coco"), str(folder / "yolo"), "--to", "yolo"]) == 0
    shutil.copytree(folder / "yolo", folder, dirs_exist_ok=True)
    for name in ("train", "val", "test", "other", "truth"):
        write_dataset(folder, name=f"coco_{name}").rename(folder / f"{name}.json")
    shutil.copytree(folder / "images" / "val", folder / "photos")
    shutil.copytree(folder / "photos", folder / "more" / "of_them")
    for path in (folder / "images").glob("coco_test_*"):
        shutil.copy(path, folder / "photos")
    shutil.copytree(folder / "yolo", folder / "dataset")
    shutil.copy(folder / "images" / "val" / "val_0.png", folder / "photo.jpg")
    (folder / "list.txt").write_text("photo.jpg\n")
    (folder / "more.yaml").write_text((folder / "data.yaml").read_text())
    experiment = {"data": {"train": {"annotations": "train.json"}, "test": {"annotations": "val.json"}}}
    (folder / "mine.yaml").write_text(yaml.safe_dump(merge(experiment, SMALLER)))
    (folder / SMALLER_FILE).write_text(json.dumps(SMALLER))
    (folder / SMALLER_TORCHVISION_FILE).write_text(json.dumps(SMALLER_TORCHVISION))
    truth = json.loads((folder / "truth.json").read_text())
    keys = ("image_id", "category_id", "bbox")
    found = [{key: box[key] for key in keys} | {"score": 0.9} for box in truth["annotations"]]
    for name in ("found", "boxes"):
        (folder / f"{name}.json").write_text(json.dumps(found))
    backbone = timm.create_model("test_resnet", pretrained=False)
    save_file(dict(backbone.state_dict()), folder / "mobilenetv2_100.safetensors")
    train(str(folder / "data.yaml"), run=folder / "trained", config=folder / SMALLER_FILE)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_can_be_parsed(page: Path, tmp_path: Path) -> None:
    for block in find_blocks(page.read_text()):
        assert block.language in LANGUAGES, f"line {block.line}: name the language of the block"
        check_block(block, folder=tmp_path)


def pages_to_run() -> list[Any]:
    return [
        pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] if name_of(page) in SLOW_PAGES else [])
        for page in PAGES
        if any(
            block.is_run and block.language in ("bash", "python") for block in find_blocks(page.read_text())
        )
    ]


@pytest.mark.parametrize("page", pages_to_run())
def test_the_blocks_of_a_page_run(
    page: Path,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "world"
    shutil.copytree(world, folder, ignore=shutil.ignore_patterns("trained", "coco", "yolo"))
    monkeypatch.chdir(folder)
    shutil.copytree(world / "trained", folder / "runs" / "data")
    assert run_blocks(page, monkeypatch, capsys) > 0


def blocks_of(language: str, text: str, *, before: str = "") -> list[Block]:
    return find_blocks(f"{before}\n```{language}\n{text}```\n")


def test_commands_are_read_without_assignments_and_comments() -> None:
    text = "sniper plan a.json  # why\nA=1 sniper train b.yaml \\\n    --run c && sniper recipes > list.txt\n"
    (block,) = blocks_of("bash", text)
    assert list(read_commands(block)) == [
        ["sniper", "plan", "a.json"],
        ["sniper", "train", "b.yaml", "--run", "c"],
        ["sniper", "recipes"],
    ]


def test_blocks_that_are_not_run_are_recognized() -> None:
    (run_block,) = blocks_of("bash", "sniper demo\n")
    (skipped,) = blocks_of("bash", "sniper demo\n", before=SKIPPED)
    (of_page,) = blocks_of("bash", "sniper demo\n", before=f"# Title\n\n{SKIPPED_PAGE}\n\nText.\n")
    assert [block.is_run for block in (run_block, skipped, of_page)] == [True, False, False]


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("bash", "sniper train data.yaml --epoch 3\n"),
        ("bash", "sniper train data.yaml --train.batchsize 3\n"),
        ("bash", "sniper train data.yaml --train.batch_size many\n"),
        ("bash", "sniper learn data.yaml\n"),
        ("bash", "torchrun --standalone sniper train data.yaml --run a\n"),
        ("bash", "torchrun --standalone --no-python -- sniper train data.yaml --epoch 3\n"),
        ("bash", "srun torchrun --no-python -- sniper train data.yaml --epoch 3\n"),
        ("bash", "if true; then sniper recipes\n"),
        ("bash", "python benchmarks/absent.py\n"),
        ("bash", "python benchmarks/proof.py --no-such-option\n"),
        ("python", "sniper.train(\n"),
        ("json", "{'a': 1}\n"),
        ("yaml", "train: {epochs: 1\n"),
    ],
)
def test_mistakes_in_blocks_are_detected(language: str, text: str, tmp_path: Path) -> None:
    (block,) = blocks_of(language, text)
    with pytest.raises((Exception, SystemExit), match=r"."):
        check_block(block, folder=tmp_path)
