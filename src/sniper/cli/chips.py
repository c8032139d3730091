"""`sniper chips`: choose the chips of a data set, and write them to a table, or as images for other trainers."""

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter, validators

from sniper.cli.chip_files import ChipOptions, write_search, write_training
from sniper.cli.inputs import check_parent, load_annotations, load_config
from sniper.cli.locks import locking
from sniper.cli.options import (
    ANNOTATIONS_HELP,
    Count,
    FollowLinks,
    Images,
    Json,
    default,
    flag,
    output_option,
    split_option,
)
from sniper.cli.output import announce_compilation, print_result
from sniper.cli.unknown import UnknownOption, parse_overrides
from sniper.errors import ConfigError
from sniper.files import expand_path
from sniper.runs.lock import lock_file

if TYPE_CHECKING:
    from sniper.data.chip_labels import ChipFileSpec


def _locks(
    rest: tuple[str, ...], output: Path | None, to: str | None, **_: Any
) -> Iterator[AbstractContextManager[None]]:
    out = _split_rest(rest)[0] if output is None else output
    if out is not None and (to is not None or out.parent.is_dir()):
        yield lock_file(out, option="-o" if output is not None else "OUT")


_OF_ANNOTATIONS = (
    *("chips_per_split", "num_negative_chips", "num_labels", "num_objects", "objects_in_no_chip"),
    *("out_of_range_labelled", "out_of_range_blurred", "cut_objects", "crowds"),
)
"""Counts that the windows of a search do not have, since they are written without annotations."""


@locking(_locks)
def chips(
    annotations: Annotated[
        Path, Parameter(help=f"Data set. {ANNOTATIONS_HELP} With --search, also images or a folder of them.")
    ],
    /,
    *rest: Annotated[
        str,
        Parameter(
            allow_leading_hyphen=True,
            help="With --to, the folder to write, new or empty. Fields of the experiment to set, as --SECTION.FIELD "
            "VALUE, such as --pyramid.chip_size 640.",
        ),
    ],
    output: Annotated[
        Path | None, output_option("Chip table to write (.npz); with --to, the folder.", default="OUT")
    ] = None,
    to: Annotated[
        Literal["coco", "yolo", "voc"] | None,
        Parameter(help="Write chips as images with annotations in this format, for other trainers."),
    ] = None,
    search: Annotated[
        bool,
        flag(
            "With --to: write the windows in which images are searched, without annotations, for another detector; "
            "`sniper merge` brings its detections back."
        ),
    ] = False,
    config: Annotated[
        Path | None,
        Parameter(
            help="Experiment file (YAML) or name of a recipe; for a search, the experiment.yaml of the training chips.",
            show_default=default("the paper's settings; with --to, the pyramid that `sniper plan` suggests"),
        ),
    ] = None,
    detections: Annotated[
        Path | None,
        Parameter(
            name="--from",
            help="With --to: COCO result file of any detector; negative chips are cut around its false alarms.",
            show_default=default("windows at random that show no object"),
        ),
    ] = None,
    proposals: Annotated[
        Path | None, Parameter(help="Folder written by `sniper mine`; adds negative chips.")
    ] = None,
    dose: Annotated[
        float | None,
        Parameter(
            validator=validators.Number(gte=0, lte=10),
            help="With --to: the most negative chips, as a share of the positive chips.",
            show_default=default("0.25"),
        ),
    ] = None,
    epochs: Annotated[
        Count | None,
        Parameter(
            help="With --to: epochs whose chips are written. Objects are in other chips of each epoch.",
            show_default=default("1"),
        ),
    ] = None,
    val: Annotated[
        Path | None,
        Parameter(
            help="With --to: data set to validate on.",
            show_default=default("the split val or test, or else a tenth of the images"),
        ),
    ] = None,
    val_as: Annotated[
        Literal["chips", "windows", "whole", "none"] | None,
        Parameter(
            help="With --to: write the images to validate on as chips like those of training, as windows of a search, "
            "whole, or not at all.",
            show_default=default("chips"),
        ),
    ] = None,
    out_of_range: Annotated[
        Literal["label", "blur", "skip"] | None,
        Parameter(
            help="With --to: annotate objects of sizes that their level does not train on, blur their pixels to grey, "
            "or skip chips that show one.",
            show_default=default("label"),
        ),
    ] = None,
    ignored: Annotated[
        Literal["crowd", "blur", "keep"] | None,
        Parameter(
            help="With --to: annotate crowds, and objects that are cut off, as regions to ignore; leave them out and "
            "blur their pixels to grey; or leave them out alone.",
            show_default=default("crowd, and blur for yolo, which has no regions to ignore"),
        ),
    ] = None,
    min_visibility: Annotated[
        float | None,
        Parameter(
            validator=validators.Number(gte=0, lte=1),
            help="With --to: share of its area that a chip must show of an object to annotate it, beside "
            "data.min_visible_side.",
            show_default=default("0.1"),
        ),
    ] = None,
    encoding: Annotated[
        Literal["jpeg", "png"] | None,
        Parameter(help="With --to: format of the images.", show_default=default("jpeg")),
    ] = None,
    quality: Annotated[
        int | None,
        Parameter(
            validator=validators.Number(gte=1, lte=100),
            help="With --to: quality of JPEG.",
            show_default=default("95"),
        ),
    ] = None,
    images: Images = None,
    split: Annotated[
        str | None, split_option("train, or everything where there are no splits; with --search, val or test")
    ] = None,
    follow_links: FollowLinks = False,
    seed: Annotated[
        int | None,
        Parameter(
            validator=validators.Number(gte=0, lte=2**63 - 1),
            help="Seed of the random choice between equally good chips.",
            show_default=default("0, or that of --config"),
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Choose the chips of a data set, and write them to a table, or as images for other trainers.

    A table (-o FILE.npz) is used by an experiment that names it in `data.chips`. With `--to`, chips are written as
    images with annotations, and a manifest that `sniper merge` reads. A stopped command is continued by the same one.
    Under torchrun, each process writes its share.
    """
    started = time.monotonic()
    folder, overrides = _split_rest(rest)
    given = {
        "--search": search or None, "--from": detections, "--dose": dose, "--epochs": epochs, "--val": val,
        "--val-as": val_as, "--out-of-range": out_of_range, "--ignored": ignored,
        "--min-visibility": min_visibility, "--encoding": encoding, "--quality": quality,
        "--follow-links": follow_links or None,
    }  # fmt: skip
    fields = {f"--{name}": value for name, value in overrides.items()}
    given = {name: value for name, value in given.items() if value is not None}
    if to is None:
        _check_table_options(given, folder=folder, output=output)
        assert output is not None
        _write_table(
            annotations,
            output,
            config=config,
            overrides=fields,
            proposals=proposals,
            images=images,
            split=split,
            seed=seed or 0,
            is_json=json,
            started=started,
        )
        return
    if output is not None and folder is not None:
        raise ConfigError(f"{folder} and -o {output}: expected one folder to write")
    target = output or folder
    if target is None:
        raise ConfigError(f"--to {to}: expected the folder to write, as OUT or -o OUT")
    options = ChipOptions(
        annotations=annotations,
        folder=target,
        config=config,
        overrides=fields,
        images=images,
        split=split,
        follow_links=follow_links,
        seed=seed,
        files=_file_spec(
            to,
            out_of_range=out_of_range,
            ignored=ignored,
            min_visibility=min_visibility,
            encoding=encoding,
            quality=quality,
        ),
    )
    if search:
        _check_search_options(given, proposals=proposals)
        result = write_search(options)
    else:
        if detections is not None and proposals is not None:
            raise ConfigError("--from and --proposals: expected one source of negative chips")
        result = write_training(
            options,
            val=val,
            val_as=val_as or "chips",
            num_epochs=epochs or 1,
            dose=dose,
            detections=detections,
            proposals=proposals,
        )
    if result is None:  # not the first process
        return
    result["seconds"] = round(time.monotonic() - started, 3)
    result["output"] = str(target)
    if search and not json:
        result = {name: value for name, value in result.items() if name not in _OF_ANNOTATIONS}
    print_result(result if json else _to_text(result), is_json=json)


def _split_rest(rest: tuple[str, ...]) -> tuple[Path | None, dict[str, str]]:
    """Split arguments into the folder to write, and fields of the experiment by dotted name.

    Raises:
        UnknownOption: if an option is no field.
        ConfigError: if there are two folders, or a field has no value.
    """
    folder: Path | None = None
    options: list[str] = []
    arguments = list(rest)
    while arguments:
        argument = arguments.pop(0)
        if argument.startswith("-"):
            name, has_value, _ = argument.partition("=")
            if "." not in name:
                raise UnknownOption(name)
            options.append(argument)
            if not has_value and arguments:
                options.append(arguments.pop(0))
        elif folder is None:
            folder = expand_path(argument)
        else:
            raise ConfigError(f"{argument}: is one argument too many; the folder to write is {folder}")
    return folder, parse_overrides(options)


def _check_table_options(given: Mapping[str, Any], *, folder: Path | None, output: Path | None) -> None:
    """Check that there is no option of written images, without --to."""
    if given:
        raise ConfigError(f"{next(iter(given))} requires --to yolo, coco or voc")
    if folder is not None:
        raise ConfigError(
            f"{folder}: a folder of chips requires --to yolo, coco or voc; a chip table is named by -o FILE.npz"
        )
    if output is None:
        raise ConfigError("expected -o FILE.npz, the chip table to write, or --to yolo|coco|voc OUT")


def _check_search_options(given: Mapping[str, Any], *, proposals: Path | None) -> None:
    """Check that there is no option of training chips, with --search."""
    of_training = ("--from", "--dose", "--epochs", "--val", "--val-as", "--out-of-range", "--ignored")
    wrong = [name for name in (*of_training, "--min-visibility") if name in given]
    if proposals is not None:
        wrong.append("--proposals")
    if wrong:
        raise ConfigError(f"{wrong[0]}: is of chips to train on; --search writes windows without annotations")


def _file_spec(to: Literal["coco", "yolo", "voc"], **given: Any) -> "ChipFileSpec":
    from sniper.data.chip_labels import ChipFileSpec

    if given["encoding"] == "png" and given["quality"] is not None:
        raise ConfigError("--quality: is of jpeg; PNG loses nothing")
    given["ignored"] = given["ignored"] or ("blur" if to == "yolo" else "crowd")
    return ChipFileSpec(to=to, **{name: value for name, value in given.items() if value is not None})


def _to_text(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result as lines for people."""
    texts = {name: value for name, value in result.items() if value not in ([], {})}
    for name, value in texts.items():
        if isinstance(value, dict):
            texts[name] = ", ".join(f"{count:,} {split}" for split, count in value.items())
        elif isinstance(value, list):
            texts[name] = "; ".join(map(str, value))
    return texts


def _write_table(
    annotations: Path,
    output: Path,
    *,
    config: Path | None,
    overrides: Mapping[str, str],
    proposals: Path | None,
    images: Path | None,
    split: str | None,
    seed: int,
    is_json: bool,
    started: float,
) -> None:
    from sniper.chips import ChipTable
    from sniper.data.epoch import to_image_boxes
    from sniper.planning.cost import compute_cost
    from sniper.planning.plan import choose_chips

    check_parent(output)
    if output.is_file() and not ChipTable.is_table(output):
        raise ConfigError(f"-o {output}: is no chip table, and would be replaced; choose another name")
    spec = load_config(config, overrides)
    dataset = load_annotations(annotations, images=images, split=split, data=spec.data)
    with announce_compilation():
        table = choose_chips(dataset, spec, proposals=proposals, seed=seed)
    table.save(output, pyramid=spec.pyramid, digest=dataset.digest)
    cost = compute_cost(
        table,
        to_image_boxes(dataset),
        pyramid=spec.pyramid,
        negatives=spec.negatives,
    )
    seconds = round(time.monotonic() - started, 3)
    print_result({**cost.as_dict(), "seconds": seconds, "output": str(output)}, is_json=is_json)
