"""Score proposals for `sniper evaluate --proposals`: load them with their ground truth, and print their recall."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sniper.cli.inputs import load_annotations, load_split, scored_split
from sniper.cli.output import print_line, print_result, print_table, print_warnings
from sniper.errors import (
    AnnotationError,
    ConfigError,
    DetectionsError,
    ProposalsError,
    count_and_list,
    counted,
)

if TYPE_CHECKING:
    from sniper.data.datasets import Dataset
    from sniper.evaluation.pair import EvaluationPair


def evaluate_proposals(
    path: Path,
    annotations: Path | None,
    *,
    split: str | None,
    crowds: Literal["ignore", "objects"] | None,
    limit: int | None,
    json: bool,
) -> None:
    """Print the recall of proposals.

    Args:
        path: folder of `sniper mine`, or COCO result file.
        annotations: the data set; None for the training images of the run whose folder the proposals are in.
        split: of the data set.
        crowds: how boxes that are marked as crowds are used; None for the setting of the run, else to ignore them.
        limit: how many images are scored; None for all.
        json: whether to print a JSON object.

    Raises:
        ConfigError: if there is no such path, or no data set.
        AnnotationError: if annotations cannot be loaded.
        DetectionsError: if results cannot be read or are of other images.
        ProposalsError: if the folder has no complete proposals of these images.
    """
    from sniper.evaluation.proposals import score_proposals
    from sniper.reports.scores import show_proposals

    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder")
    dataset = _load_dataset(path, annotations, split=split, crowds=crowds)
    pair = _read_store(path, dataset) if path.is_dir() else _read_results(path, dataset)
    scores = score_proposals(pair if limit is None else pair.first_images(limit))
    if json:
        print_result(scores.as_dict(), is_json=True)
        return
    print_line(f"{counted(scores.num_images, 'image')}, {counted(scores.num_proposals, 'proposal')}")
    print_line("AR: mean recall over IoU 0.50 to 0.95; R50: recall at IoU 0.50")
    print_line("")
    print_table(show_proposals(scores))


def _load_dataset(
    path: Path, annotations: Path | None, *, split: str | None, crowds: Literal["ignore", "objects"] | None
) -> "Dataset":
    """Load the data set, read as the run of the proposals reads it, so that it is recognized as the same."""
    from sniper.config.loading import load_experiment
    from sniper.data.spec import DataSpec
    from sniper.runs.run import Run

    spec = None
    if path.is_dir() and (path.resolve().parent / "config.yaml").is_file():
        spec = load_experiment(Run.open(path.resolve().parent).config_path)
    data = DataSpec() if spec is None else spec.data
    data = replace(data, crowds=crowds or data.crowds)
    if annotations is not None:
        return load_annotations(annotations, images=None, split=scored_split(annotations, split), data=data)
    if spec is None:
        raise ConfigError(
            f"{path}: expected a data set after it: sniper evaluate --proposals {path} ANNOTATIONS"
        )
    if split is not None:
        raise ConfigError("--split requires annotations")
    return load_split(replace(spec, data=data), "train", has_images=False)


def _read_store(folder: Path, dataset: "Dataset") -> "EvaluationPair":
    """Read the proposals of a folder, and print a warning of images that could not be searched."""
    import numpy as np

    from sniper.evaluation.pair import EvaluationPair, GroundTruth
    from sniper.geometry import Detections
    from sniper.geometry.boxes import to_xywh
    from sniper.inference.proposals import has_false_alarms, open_proposals

    if (folder / "config.yaml").is_file():
        raise ProposalsError(
            f"{folder}: is the folder of a run, expected one of proposals, such as {folder / 'proposals'}"
        )
    store = open_proposals(folder, dataset)
    if has_false_alarms(store):
        raise ProposalsError(
            f"{folder}: has false alarms, which are on no object; expected proposals, as `sniper mine --source rpn` "
            "collects them"
        )
    if store.unreadable:
        ids = count_and_list([str(dataset.image_ids[index]) for index in store.unreadable], separator=", ")
        images = counted(len(store.unreadable), "image")
        print_warnings([f"{images} could not be read and counted without proposals: {ids}"])
    joined = Detections.join([store.read(index) or Detections.empty() for index in range(len(dataset))])
    return EvaluationPair(
        truth=GroundTruth.of(dataset),
        image_indices=np.repeat(np.arange(len(dataset)), store.counts),
        labels=joined.labels.astype(np.int64),
        boxes=to_xywh(joined.boxes),
        scores=joined.scores,
    )


def _read_results(path: Path, dataset: "Dataset") -> "EvaluationPair":
    """Read COCO results as proposals, whatever their categories."""
    import numpy as np

    from sniper.evaluation.pair import EvaluationPair, GroundTruth
    from sniper.evaluation.results import load_detections

    truth = GroundTruth.of(dataset)
    if not truth.categories:
        raise AnnotationError(f"{dataset.path}: has no categories")
    table = load_detections(path)
    category_ids = np.array([truth.categories[0].category_id] * len(table))
    try:
        return EvaluationPair.of(replace(table, category_ids=category_ids, class_names={}), truth)
    except DetectionsError as error:
        raise DetectionsError(f"{path}: {error}") from error
