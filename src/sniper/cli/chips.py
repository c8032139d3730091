"""`sniper chips`: choose the chips of a data set and write them to a file."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

from sniper.cli.inputs import check_parent, load_annotations, load_config
from sniper.cli.locks import locking
from sniper.cli.options import Annotations, Config, Images, Json, Proposals, Seed, TrainSplit, output_option
from sniper.cli.output import announce_compilation, print_result
from sniper.runs.lock import lock_file


def _locks(output: Path, **_: Any) -> Iterator[AbstractContextManager[None]]:
    if output.parent.is_dir():
        yield lock_file(output, option="-o")


@locking(_locks)
def chips(
    annotations: Annotations,
    /,
    *,
    output: Annotated[Path, output_option("Chip table to write (.npz).")],
    config: Config = None,
    proposals: Proposals = None,
    images: Images = None,
    split: TrainSplit = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Choose the chips of a data set and write them to a file.

    The file is used by an experiment that names it in `data.chips`. The image files are not needed.
    """
    started = time.monotonic()
    from sniper.data.epoch import to_image_boxes
    from sniper.planning.cost import compute_cost
    from sniper.planning.plan import choose_chips

    spec = load_config(config)
    dataset = load_annotations(annotations, images=images, split=split, data=spec.data)
    with announce_compilation():
        table = choose_chips(dataset, spec, proposals=proposals, seed=seed)
    check_parent(output)
    table.save(output, pyramid=spec.pyramid, digest=dataset.digest)
    cost = compute_cost(
        table,
        to_image_boxes(dataset),
        pyramid=spec.pyramid,
        negatives=spec.negatives,
    )
    seconds = round(time.monotonic() - started, 3)
    print_result({**cost.as_dict(), "seconds": seconds, "output": str(output)}, is_json=json)
