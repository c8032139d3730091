"""`sniper convert`: write a data set in another format."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from sniper.cli.locks import locking
from sniper.cli.options import Annotations, ClassProperty, Crowds, FollowLinks, Json, default, split_option
from sniper.cli.output import print_result, print_warnings
from sniper.runs.lock import lock_file


def _locks(out: Path, **_: Any) -> Iterator[AbstractContextManager[None]]:
    yield lock_file(out, option="OUT")


@locking(_locks)
def convert(
    source: Annotations,
    out: Annotated[Path, Parameter(help="Folder to write, new or empty.")],
    /,
    *,
    to: Annotated[Literal["coco", "yolo", "voc"], Parameter(help="Format to write.")],
    split: Annotated[str | None, split_option("all, each under its name")] = None,
    images: Annotated[
        Literal["copy", "link", "none"],
        Parameter(help="Copy the image files, create hard links to them, or write annotations alone."),
    ] = "copy",
    root: Annotated[
        Path | None,
        Parameter(
            help="Folder that the file names in SOURCE are relative to.",
            show_default=default("the usual folder of its format"),
        ),
    ] = None,
    crowds: Crowds = "ignore",
    masks: Annotated[
        Literal["read", "ignore"], Parameter(help="Write the masks of objects, or boxes alone.")
    ] = "read",
    follow_links: FollowLinks = False,
    class_property: ClassProperty = None,
    json: Json = False,
) -> None:
    """Write a data set as COCO JSON, YOLO or Pascal VOC.

    Boxes are written as they are used: clipped to their images, without those that are dropped.
    """
    started = time.monotonic()
    from sniper.data.datasets.load import load_splits
    from sniper.data.datasets.write import count_boxes, write_dataset
    from sniper.data.images.tiff import has_rasterio
    from sniper.data.spec import DataSpec, ReadSpec

    data = DataSpec(
        # Files are copied, so that every range and every band is right for their pixels.
        read=ReadSpec(intensity_range=(0, 65_535), bands=(1,) if has_rasterio() else None),
        crowds=crowds,
        masks=masks,
        follow_links=follow_links,
        class_property=class_property,
    )
    splits = load_splits(source, image_root=root, split=split, has_images=images != "none", data=data)
    for dataset in splits.values():
        print_warnings(dataset.warnings)
    print_warnings(f"{out}: {warning}" for warning in write_dataset(splits, out, to=to, images=images))
    print_result(
        {
            "splits": list(splits) if any(splits) else [],
            "num_images": sum(len(dataset) for dataset in splits.values()),
            "num_boxes": sum(count_boxes(dataset, to=to) for dataset in splits.values()),
            "seconds": round(time.monotonic() - started, 3),
            "output": str(out),
        },
        is_json=json,
    )
