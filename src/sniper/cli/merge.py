"""`sniper merge`: bring detections that another detector made on chips back to their images."""

import json as json_module
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from sniper.cli.inputs import check_parent, check_results_file
from sniper.cli.locks import locking
from sniper.cli.options import Json, default, output_option
from sniper.cli.output import announce_compilation, print_result, print_warnings
from sniper.cli.progress import show_progress
from sniper.cli.search import split_overrides
from sniper.errors import ConfigError, counted
from sniper.runs.lock import lock_file


def _locks(output: Path, **_: Any) -> Iterator[AbstractContextManager[None]]:
    if output.parent.is_dir():
        yield lock_file(output, option="-o")


@locking(_locks)
def merge(
    detections: Annotated[
        Path,
        Parameter(
            help="COCO results of any detector on chips (JSON), named by the ids or the file names of the chips; or a "
            "folder of YOLO's text files with confidences (save_txt=True save_conf=True)."
        ),
    ],
    /,
    *overrides: Annotated[
        str,
        Parameter(
            allow_leading_hyphen=True,
            help="Fields of the section predict to set, as --predict.FIELD VALUE, such as --predict.merge hard.",
        ),
    ],
    manifest: Annotated[Path, Parameter(help="Folder of the chips, or chips.jsonl in it.")],
    output: Annotated[Path, output_option("COCO result file of the images to write.")],
    config: Annotated[
        Path | None,
        Parameter(
            help="Experiment file (YAML) whose section predict is used.",
            show_default=default("experiment.yaml beside the manifest"),
        ),
    ] = None,
    ranges: Annotated[
        Literal["keep", "ignore"],
        Parameter(
            help="Keep the ranges of the levels: a chip reports the objects whose size is in the range of its level; "
            "or ignore them."
        ),
    ] = "keep",
    category_ids: Annotated[
        Literal["ids", "from-0", "from-1"],
        Parameter(
            help="What category_id of COCO results is: an id of the annotations of the chips, or a number of the class "
            "from 0 or from 1."
        ),
    ] = "ids",
    split: Annotated[
        str | None,
        Parameter(
            help="Split of the chips that the detections are of, where images of several splits have the same ids.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Bring detections that another detector made on chips back to their images, and merge them as a search does.

    The chips are those of `sniper chips --to`; with `--search`, all images are covered at all levels, so that
    `sniper evaluate` scores the detector on whole images.
    """
    started = time.monotonic()
    from sniper.config.loading import load_experiment, parse_experiment
    from sniper.data.chip_manifest import read_manifest
    from sniper.data.export import EXPERIMENT
    from sniper.files import atomic_write
    from sniper.inference.chip_detections import load_chip_detections, merge_chips, to_results

    paths, options = split_overrides(overrides, sections=("predict",))
    if paths:
        raise ConfigError(
            f"{paths[0]}: is one argument too many; usage: sniper merge DETECTIONS --manifest CHIPS -o FILE"
        )
    chips = read_manifest(manifest).of_split(split)
    check_parent(output)
    if output.exists() and detections.exists() and output.samefile(detections):
        raise ConfigError(f"-o {output}: is the file of the detections on chips; choose another name")
    check_results_file(output)
    if config is None and (chips.path.parent / EXPERIMENT).is_file():
        config = chips.path.parent / EXPERIMENT
    spec = (
        parse_experiment("", source=Path("options"), overrides=options)
        if config is None
        else load_experiment(config, overrides=options)
    ).predict
    found, categories = load_chip_detections(detections, chips, category_ids=category_ids)
    num_without = len(chips.chips) - len(set(found.chips.tolist()))
    if 2 * num_without > len(chips.chips):
        print_warnings([f"{num_without:,} of {counted(len(chips.chips), 'chip')} have no detection"])
    if category_ids == "from-0" and len(found.chips) and found.detections.labels.min() > 0:
        print_warnings(
            [
                f"no detection has the category_id 0, that of {categories[0].name!r} with --category-ids from-0; if "
                "classes are numbered from 1, use from-1"
            ]
        )
    num_merged = num_images = num_cut = 0
    with show_progress() as bars, announce_compilation(), atomic_write(output) as file:
        separator = b"[\n"
        for image in merge_chips(
            found, chips, spec, in_valid_range=ranges == "keep", on_progress=bars.merging
        ):
            num_images += 1
            num_merged += len(image.detections)
            num_cut += len(image.detections) == spec.max_detections
            for entry in to_results(image, categories):
                file.write(separator + json_module.dumps(entry).encode())
                separator = b",\n"
        file.write(b"\n]\n" if separator == b",\n" else b"[\n]\n")
    if num_cut:
        print_warnings(
            [
                f"{num_cut} image{'s have' if num_cut > 1 else ' has'} as many detections as predict.max_detections "
                f"allows ({spec.max_detections}), and perhaps had more"
            ]
        )
    print_result(
        {
            "num_chips": len(chips.chips),
            "num_chips_without_detections": num_without,
            "num_detections_on_chips": len(found.chips),
            "num_images": num_images,
            "num_detections": num_merged,
            "ranges": ranges,
            "seconds": round(time.monotonic() - started, 3),
            "output": str(output),
        },
        is_json=json,
    )
