"""`plan`: the pyramid that suits a data set, its chips and their cost, before any training."""

import os
import textwrap
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from sniper.chips import ChipTable
from sniper.config.experiment import ExperimentSpec
from sniper.config.loading import dump_changes, is_given, load_experiment, load_partial
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.datasets.load import find_splits
from sniper.data.datasets.splits import choose_splits, scored_split
from sniper.data.epoch import choose_positive_chips, to_image_boxes
from sniper.data.spec import SourceSpec
from sniper.errors import AnnotationError
from sniper.files import expand_path
from sniper.planning.cluster import Cluster, ClusterPlan, measure_reading
from sniper.planning.cost import USEFUL_SIZES, CostPlan, compute_cost, levels_megapixels
from sniper.planning.experiment import suggest_experiment
from sniper.planning.given import Given
from sniper.planning.limits import limit_search
from sniper.planning.page import PlanPage
from sniper.planning.suggest import CHIP_SIZES, Suggestion, suggest_pyramid

if TYPE_CHECKING:
    import torch

    from sniper.planning.measure import Measurement


def plan(
    data: Dataset | str | os.PathLike[str],
    *,
    experiment: ExperimentSpec | str | os.PathLike[str] | None = None,
    images: str | os.PathLike[str] | None = None,
    split: str | None = None,
    class_property: str | None = None,
    proposals: str | os.PathLike[str] | None = None,
    num_levels: int | None = None,
    share: float | None = None,
    useful_sizes: tuple[float, float] | None = None,
    batch_size: int | None = None,
    crowded_above: int = 100,
    is_measured: bool = False,
    device: "str | torch.device | None" = None,
    gpus: str | None = None,
    chips_per_second: float | None = None,
    seed: int = 0,
) -> PlanPage:
    """Suggest a pyramid, and compute what training on its chips costs, or on those of a given experiment.

    Args:
        data: a data set, or its annotation file or folder. The image files are needed only if `is_measured`, or where
            the annotations lack the sides of images.
        experiment: its pyramid is planned with, and compared with the suggestion; None plans with the suggestion. So
            does a file with neither training images nor levels, whose fields are kept, as `train` keeps them.
        images: folder that the file names are relative to; see `load_dataset`.
        split: of the data set; see `load_dataset`.
        class_property: property of GeoJSON features that has the class; None is that of the experiment.
        proposals: folder that `sniper mine` wrote; negative chips are chosen from it.
        num_levels: suggest a pyramid of this many levels; see `suggest_pyramid`.
        share: fraction of the boxes that the suggested pyramid must bring to a useful size; see `suggest_pyramid`.
        useful_sizes: the sizes, from and to, at which a detector does well, chip pixels; None takes those of the
            neck: 16 to 480 with a feature pyramid, 32 to 480 with one map.
        batch_size: chips per step; None takes that of the experiment.
        crowded_above: chips that show more boxes are counted as crowded.
        is_measured: whether to train for a few steps, to measure minutes and memory.
        device: where to measure; by default a GPU if there is one.
        gpus: also plan for a cluster: machines x GPUs of each, such as `8x8`. The speed of a GPU is measured here if
            `chips_per_second` is not given.
        chips_per_second: of one GPU, for a GPU that is not here.
        seed: breaks ties between equally good chips.

    Returns:
        The plan: figures, suggestion and the page; `save` writes it.

    Raises:
        AnnotationError: if the data set cannot be used.
        ConfigError: if the experiment cannot be used.
        ProposalsError: if the proposals cannot be used.
        SniperError: if steps are measured and cannot be trained; see `sniper.planning.measure.measure`.

    Example:
        >>> page = sniper.plan("train.json")  # doctest: +SKIP
        >>> page.cost.mean_chips_per_image  # doctest: +SKIP
        >>> page.save(Path("plans/train"))  # doctest: +SKIP
    """
    cluster = None if gpus is None else Cluster.parse(gpus)
    is_measured = is_measured or (cluster is not None and chips_per_second is None)
    is_given_experiment, given = experiment is not None, Given()
    if experiment is not None and not isinstance(experiment, ExperimentSpec):
        experiment, given = load_given(experiment)
    if experiment is not None and batch_size is not None:
        experiment = replace(experiment, train=replace(experiment.train, batch_size=batch_size))
    base = experiment or given.spec
    if class_property is not None:
        base = replace(base, data=replace(base.data, class_property=class_property))
        experiment = None if experiment is None else base
    if not isinstance(data, Dataset):
        data = load_dataset(data, image_root=images, split=split, has_images=is_measured, data=base.data)
    if data.follow_links and not base.data.follow_links:
        base = replace(base, data=replace(base.data, follow_links=True))
        experiment = None if experiment is None else base
    boxes = to_image_boxes(data)
    options = (
        images,
        split,
        class_property,
        proposals,
        num_levels,
        share,
        useful_sizes,
        batch_size,
    )
    is_derived = (
        not is_given_experiment and all(option is None for option in options) and not data.follow_links
    )
    neck = given.neck if experiment is None else "fpn" if base.model.has_pyramid else "concat"
    useful_sizes = useful_sizes or USEFUL_SIZES[neck]
    suggestion = suggest_pyramid(
        boxes,
        base=base.pyramid,
        num_levels=num_levels,
        share=share,
        chip_sizes=(base.pyramid.chip_size,) if given.has("pyramid.chip_size") else CHIP_SIZES,
        useful_sizes=useful_sizes,
        seed=seed,
    )
    suggested, is_scored = None, False
    if suggestion is not None:
        source = _source(data, base, images=images, split=split)
        is_scored = bool(base.data.test.annotations) or _has_other_split(data, split)
        if experiment is None:
            suggested = suggest_experiment(
                suggestion.cost,
                data=replace(base.data, train=source),
                is_scored=is_scored,
                batch_size=batch_size or (base.train.batch_size if given.has("train.batch_size") else None),
                neck=neck,
                model=base.model,
                has_masks=data.masks is not None,
            )
            if batch_size is not None:
                given = replace(given, overrides={"train.batch_size": str(batch_size)})
            merged = replace(given.over(suggested), data=suggested.data)  # options come before the file
            suggested = limit_search(merged, boxes, is_given=given.has)
        else:
            suggested = experiment.with_pyramid(suggestion.pyramid, train=source)
    planned = experiment or suggested or base
    if suggestion is not None and planned is suggested and proposals is None:
        table, cost = suggestion.table, suggestion.cost
    else:
        table = choose_chips(data, planned, proposals=proposals, seed=seed)
        cost = compute_cost(
            table,
            boxes,
            pyramid=planned.pyramid,
            negatives=planned.negatives,
            useful_sizes=useful_sizes,
        )
    measurement = None
    if is_measured:
        from sniper.planning.measure import measure

        measurement = measure(planned, data, device=device)
    return PlanPage(
        dataset=data,
        experiment=planned,
        table=table,
        cost=cost,
        suggestion=suggestion,
        test_megapixels=levels_megapixels(planned.predict.levels, boxes) / max(cost.num_images, 1),
        crowded_above=crowded_above,
        suggested_yaml=_to_yaml(suggested, suggestion, is_scored=is_scored),
        source=data.path if is_derived else None,
        measurement=measurement,
        cluster=None
        if cluster is None
        else _plan_cluster(cluster, planned, data, cost, measurement=measurement, given=chips_per_second),
    )


def load_given(path: str | os.PathLike[str]) -> tuple[ExperimentSpec | None, Given]:
    """Load an experiment; or some fields, if the file has neither levels nor the images to train on.

    Raises:
        ConfigError: naming all problems of the file.
    """
    file = expand_path(path)
    if file.exists():  # else it is the name of a recipe
        spec, names = load_partial(file)
        if not is_given("pyramid.levels", names) and not is_given("data.train", names):
            return None, Given(config=file, spec=spec, names=names)
    return load_experiment(os.fspath(path)), Given()


def _plan_cluster(
    cluster: Cluster,
    experiment: ExperimentSpec,
    dataset: Dataset,
    cost: CostPlan,
    *,
    measurement: "Measurement | None",
    given: float | None,
) -> ClusterPlan:
    """Compute what a training takes on a cluster on which each GPU has the batch of the experiment."""
    batch_size = experiment.train.batch_size
    if given is not None:
        speed, source = given, "given"
    else:
        assert measurement is not None
        speed, source = batch_size / measurement.seconds_per_step, f"measured on {measurement.device} here"
    return ClusterPlan(
        cluster=cluster,
        chips_per_second=speed,
        source=source,
        batch_size=batch_size * cluster.num_gpus,
        chips_per_epoch=cost.num_chips + cost.num_negatives_per_epoch,
        epochs=experiment.train.epochs,
        num_images=cost.num_images,
        reading=measure_reading(experiment, dataset) if cost.num_required else None,
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
    from sniper.inference.proposals import add_negatives, open_proposals  # imports torch

    store = open_proposals(expand_path(proposals), dataset)
    return add_negatives(table, store, experiment.negatives, pyramid=experiment.pyramid, generator=generator)


def _to_yaml(experiment: ExperimentSpec | None, suggestion: Suggestion | None, *, is_scored: bool) -> str:
    """Write the suggested experiment as YAML, with the reason as a comment; empty if there is none."""
    if experiment is None or suggestion is None:
        return ""
    reason = textwrap.wrap(suggestion.reason, width=108)
    lines = ["Suggested by `sniper plan`; fields that are not listed have their defaults.", *reason]
    if not is_scored:
        lines.append("For scores after training, name validation data in data.test.annotations.")
    return "".join(f"# {line}\n" for line in lines) + dump_changes(experiment)


def _has_other_split(dataset: Dataset, split: str | None) -> bool:
    """Check whether a data set on disk has a split to score on other than the one that is trained on."""
    try:
        available = find_splits(dataset.path)
    except AnnotationError:  # the data set is in memory alone
        return False
    scored = scored_split(available)
    return scored is not None and scored not in choose_splits(dataset.path, available, split)


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
    if images is None and expand_path(experiment.data.train.annotations) == path:
        root = experiment.data.train.images
    return SourceSpec(
        annotations=str(path),
        images=None if root is None else str(expand_path(root).absolute()),
        split=split,
    )
