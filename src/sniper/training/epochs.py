"""The chips of each epoch, as an experiment configures them: chips, whole images or tiles."""

from pathlib import Path
from typing import Any

from sniper.chips import ChipTable
from sniper.chips.image_boxes import ScoredBoxes
from sniper.config.experiment import ExperimentSpec
from sniper.data.datasets import Dataset
from sniper.data.epoch import EpochOrder, order_chips, order_tiles, order_whole_images, to_image_boxes
from sniper.runs.processes import SINGLE_PROCESS, Processes
from sniper.runs.run import Run


def order_epoch(
    spec: ExperimentSpec,
    dataset: Dataset,
    *,
    epoch: int,
    table: ChipTable | None = None,
    alarms: ScoredBoxes | None = None,
    dose: float | None = None,
    num_shares: int = 1,
) -> EpochOrder:
    """Choose, shuffle and batch the chips, whole images or tiles of one epoch.

    Args:
        spec: the experiment.
        dataset: the training set.
        epoch: 0 for the first.
        table: chips chosen before; None chooses positive chips anew.
        alarms: the false alarms to choose chips on, if no table is given.
        dose: the most negative chips as a share of the positive chips; None does not limit it.
        num_shares: number of parts that each batch is computed in, by all processes.

    Raises:
        AnnotationError: if the data set has no box to learn from.
    """
    data, batch_size = spec.data, spec.train.batch_size
    random: dict[str, Any] = {"flip": data.flip, "seed": spec.seed, "epoch": epoch}
    if data.whole is not None:
        return order_whole_images(
            dataset,
            data.whole,
            batch_size=batch_size,
            chip_size=spec.pyramid.chip_size,
            num_shares=num_shares,
            **random,
        )
    if data.tiles is not None:
        return order_tiles(
            dataset, data.tiles, batch_size=batch_size, images_at_once=data.images_at_once, **random
        )
    return order_chips(
        dataset,
        spec.pyramid,
        batch_size=batch_size,
        table=table,
        alarms=alarms,
        negatives=spec.negatives,
        dose=0.0 if spec.train.rpn_only else dose,
        images_at_once=data.images_at_once,
        **random,
    )


def load_configured_chips(
    run: Run, spec: ExperimentSpec, dataset: Dataset, *, processes: Processes = SINGLE_PROCESS
) -> ChipTable | None:
    """Load the chips of all epochs if the experiment names a table (`data.chips`), else None.

    The run keeps a copy, and continues with that copy whatever happens to the file.

    Raises:
        ChipTableError: if it cannot be read, or belongs to another pyramid or data set.
    """
    if spec.data.chips is None:
        return None
    has_copy = bool(run.checkpoints) and run.chips_path.exists()
    path = run.chips_path if has_copy else Path(spec.data.chips)
    table = ChipTable.load(path, pyramid=spec.pyramid, images=to_image_boxes(dataset), digest=dataset.digest)
    processes.barrier()
    if not has_copy and processes.is_first:
        table.save(run.chips_path, pyramid=spec.pyramid, digest=dataset.digest)
    return table
