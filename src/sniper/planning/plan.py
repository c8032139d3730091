"""`plan`: the chips of a data set, their cost, and the pyramids that suit it, before any training."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sniper.chips import ChipTable
from sniper.config.experiment import ExperimentSpec
from sniper.config.loading import dump_changes, load_experiment
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.epoch import choose_positive_chips, to_image_boxes
from sniper.data.spec import SourceSpec
from sniper.files import expand_path
from sniper.inference.proposals import add_negatives, open_proposals
from sniper.planning.cost import compute_cost, levels_megapixels
from sniper.planning.page import PlanPage
from sniper.planning.suggest import suggest_pyramids

MAX_LEVELS = 4
"""Pyramids of 1 to this many levels are tried."""


def plan(
    data: Dataset | str | os.PathLike[str],
    *,
    experiment: ExperimentSpec | str | os.PathLike[str] | None = None,
    images: str | os.PathLike[str] | None = None,
    split: str | None = None,
    proposals: str | os.PathLike[str] | None = None,
    num_levels: int | None = None,
    share: float = 0.99,
    crowded_above: int = 100,
    seed: int = 0,
) -> PlanPage:
    """Compute what training on chips would cost, and suggest pyramids.

    Args:
        data: a data set, or its annotation file or folder. The image files are not needed where the annotations have
            the sides of images.
        experiment: its pyramid is planned with; by default the paper's.
        images: folder that the file names are relative to; see `load_dataset`.
        split: of the data set; see `load_dataset`.
        proposals: folder that `sniper mine` wrote; negative chips are chosen from it.
        num_levels: suggest a pyramid of this many levels; by default the cheapest of 1 to `MAX_LEVELS`.
        share: fraction of the boxes that a suggested pyramid must bring to a useful size.
        crowded_above: chips that show more boxes are counted as crowded.
        seed: breaks ties between equally good chips.

    Returns:
        The plan: figures, suggestions and the page; `save` writes it.

    Raises:
        AnnotationError: if the data set cannot be used.
        ConfigError: if the experiment cannot be used.
        ProposalsError: if the proposals cannot be used.

    Example:
        >>> page = sniper.plan("train.json")  # doctest: +SKIP
        >>> page.cost.mean_chips_per_image  # doctest: +SKIP
        >>> page.save(Path("plans/train"))  # doctest: +SKIP
    """
    if not isinstance(experiment, ExperimentSpec):
        experiment = ExperimentSpec() if experiment is None else load_experiment(os.fspath(experiment))
    if not isinstance(data, Dataset):
        data = load_dataset(data, image_root=images, split=split, has_images=False, data=experiment.data)
    boxes = to_image_boxes(data)
    table = choose_chips(data, experiment, proposals=proposals, seed=seed)
    cost = compute_cost(
        table, boxes, pyramid=experiment.pyramid, negatives_per_image=experiment.negatives.per_image
    )
    levels: Sequence[int] = [num_levels] if num_levels else range(1, MAX_LEVELS + 1)
    suggestions = suggest_pyramids(boxes, base=experiment.pyramid, num_levels=levels, share=share)
    suggested_yaml = ""
    if suggestions:
        source = _source(data, experiment, images=images, split=split)
        suggested_yaml = dump_changes(experiment.with_pyramid(suggestions[0].cost.pyramid, train=source))
    return PlanPage(
        dataset=data,
        table=table,
        cost=cost,
        suggestions=suggestions,
        test_megapixels=levels_megapixels(experiment.predict.levels, boxes) / max(cost.num_images, 1),
        batch_size=experiment.train.batch_size,
        crowded_above=crowded_above,
        suggested_yaml=suggested_yaml,
        read=experiment.data.read,
    )


def choose_chips(
    dataset: Dataset, experiment: ExperimentSpec, *, proposals: str | os.PathLike[str] | None, seed: int
) -> ChipTable:
    """Choose the positive chips of a data set and, if there are proposals, the negative ones.

    Args:
        dataset: the data set.
        experiment: its pyramid and its rule for negative chips are used.
        proposals: folder that `sniper mine` wrote, or None for positive chips only.
        seed: breaks ties between equally good chips.
    """
    generator = np.random.default_rng(seed)
    table = choose_positive_chips(dataset, experiment.pyramid, generator=generator)
    if proposals is None:
        return table
    store = open_proposals(expand_path(proposals), dataset)
    return add_negatives(table, store, experiment.negatives, pyramid=experiment.pyramid, generator=generator)


def _source(
    dataset: Dataset,
    experiment: ExperimentSpec,
    *,
    images: str | os.PathLike[str] | None,
    split: str | None,
) -> SourceSpec:
    """Return the planned data set as the training set of an experiment, with image root and split as given."""
    path = dataset.path.absolute()
    root = images
    if images is None and Path(experiment.data.train.annotations) == path:
        root = experiment.data.train.images
    return SourceSpec(
        annotations=str(path),
        images=None if root is None else str(expand_path(root).absolute()),
        split=split,
    )
