"""Options shared by commands: the same name, check and help text everywhere."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter, Token, convert, validators

from sniper.files import expand_path
from sniper.remote import is_url, to_path


def default(text: str) -> Callable[[Any], str]:
    """Describe a default that is not known before the command runs, for `Parameter.show_default`."""
    return lambda _: text


def output_option(text: str, *, default: str | None = None) -> Parameter:
    """Build the option for what a command writes.

    Args:
        text: help.
        default: where it is written without the option; None if the option is required.
    """
    return Parameter(name=["-o", "--output"], help=text, show_default=default and (lambda _: default))


def flag(text: str) -> Parameter:
    """Build an option without a value."""
    return Parameter(negative=(), show_default=False, help=text)


def convert_argument(kind: Any, tokens: Sequence[Token]) -> Any:
    """Convert the text of an argument to its type, with `~` and `$NAME` expanded in paths, and URLs taken for paths."""
    value = convert(kind, tokens)
    if isinstance(value, Path) and len(tokens) == 1 and is_url(tokens[0].value):
        return to_path(tokens[0].value)
    return expand_path(value) if isinstance(value, Path) else value


at_least_1 = validators.Number(gte=1)

ANNOTATIONS_HELP = (
    "COCO JSON or GeoJSON file, YOLO's data.yaml, or a folder in a common format (docs/formats.md)."
)
"""What a command accepts as a data set."""

Annotations = Annotated[Path, Parameter(help=ANNOTATIONS_HELP)]


def split_option(default: str) -> Parameter:
    """Build the option for the split of a data set; `default` describes which it is without the option."""
    return Parameter(
        help="Split of the data set: train, val, test, another name in it, or all.",
        show_default=lambda _: default,
    )


TrainSplit = Annotated[str | None, split_option("train, or everything where there are no splits")]
ScoredSplit = Annotated[str | None, split_option("val, else test, else everything")]
Config = Annotated[
    Path | None,
    Parameter(
        help="Experiment file (YAML) or name of a recipe.", show_default=default("the paper's settings")
    ),
]
Proposals = Annotated[
    Path | None,
    Parameter(help="Folder written by `sniper mine`; adds negative chips."),
]
Images = Annotated[
    Path | None,
    Parameter(
        help="Folder that the file names in the annotations are relative to.",
        show_default=default("the one that has the files, such as `images` beside the annotations"),
    ),
]
FollowLinks = Annotated[
    bool, flag("Open image files that are links to files outside the folder of the images.")
]
Crowds = Annotated[
    Literal["ignore", "objects"],
    Parameter(help="Take boxes that are marked as crowds as regions to ignore, or for objects."),
]
ClassProperty = Annotated[
    str | None,
    Parameter(
        help="Property of GeoJSON features that has the class; none takes all objects for one class.",
        show_default=default("class, label or another usual name"),
    ),
]
Count = Annotated[int, Parameter(validator=at_least_1)]
Checkpoint = Annotated[
    str,
    Parameter(
        help="Checkpoint to use: best (by AP on the validation images), last, or the number of a step."
    ),
]
Limit = Annotated[int | None, Parameter(validator=at_least_1, help="Use only the first LIMIT images.")]
Seed = Annotated[
    int,
    Parameter(
        validator=validators.Number(gte=0, lte=2**63 - 1),
        help="Seed of the random choice between equally good chips.",
    ),
]
Device = Annotated[
    str | None,
    Parameter(
        help="Device to compute on, such as cpu or cuda:0.", show_default=default("a GPU if there is one")
    ),
]
Engine = Annotated[
    Literal["torch", "onnx", "openvino"],
    Parameter(
        help="What runs the detector: torch, ONNX Runtime or OpenVINO. The others need an export of the run, which is "
        "made once, in the folder of the run."
    ),
]
Json = Annotated[bool, flag("Print one JSON object to standard output and nothing else.")]
