"""Files of ours that were damaged at random: each is read, or refused with an error that names it.

`SNIPER_TRIALS` is the number of damaged files of each kind (40), `SNIPER_SEED` the seed of the damage (0).
"""

import re
import resource
import shutil
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from sniper.chips import ChipTable
from sniper.chips.negatives import NegativeSpec
from sniper.cli import run as run_command
from sniper.config.experiment import ExperimentSpec, PredictSpec
from sniper.config.loading import (
    dump_experiment,
    is_experiment,
    load_experiment,
    load_partial,
    parse_experiment,
)
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.datasets.categories import match_categories
from sniper.data.epoch import choose_positive_chips, order_chips, to_image_boxes
from sniper.data.loader import load_batches
from sniper.data.reader import ChipReader
from sniper.data.spec import CacheSpec
from sniper.errors import SniperError
from sniper.evaluation.coco import evaluate
from sniper.evaluation.results import load_detections
from sniper.geometry import Detections
from sniper.inference.calibration import Calibration, load_calibration, save_calibration
from sniper.inference.detector import Detector
from sniper.inference.proposals import add_negatives, open_proposals, start_proposals
from sniper.inference.results import ImageToSearch, find_results, search_to_file
from sniper.inference.store import search_images
from sniper.models.build import build_detector
from sniper.models.weights import fill_module
from sniper.runs.checkpoints import OPTIMIZER, WEIGHTS, fill_optimizer
from sniper.runs.initial import InitialWeights
from sniper.runs.processes import SINGLE_PROCESS
from sniper.runs.run import Run
from sniper.training.learner import Learner
from sniper.training.optimizer import build_optimizer
from tests.campaigns import mutations
from tests.campaigns.campaign import SEED, num_trials
from tests.campaigns.mutations import Mutation, both
from tests.chips.worlds import SMALL_PYRAMID
from tests.data.tiny import write_dataset
from tests.training.experiments import CPU, tiny_experiment, train_run, with_train

NUM_MUTATIONS = num_trials(40)
COMMAND_EVERY = 15  # files; this one is read by the command line, too
MAX_SECONDS = 30
MAX_BYTES = 4_000_000_000  # that a damaged file may make the process reserve

pytestmark = pytest.mark.slow


@dataclass(frozen=True, kw_only=True)
class World:
    """Undamaged files of every kind, in a folder for each.

    Attributes:
        root: with the data set and the folders.
        dataset: that everything belongs to.
        spec: the experiment.
    """

    root: Path
    dataset: Dataset
    spec: ExperimentSpec

    @property
    def images(self) -> list[ImageToSearch]:
        return [
            ImageToSearch(image_id=record.image_id, path=record.path, record=record)
            for record in self.dataset
        ]

    @property
    def detector(self) -> Detector:
        """A detector of one object in every image."""
        return Detector(
            detect=lambda images: [one_detection(label=0) for _ in images],
            spec=PredictSpec(levels=SMALL_PYRAMID.levels),
            categories=self.dataset.categories,
            device=CPU,
        )


def one_detection(*, label: int) -> Detections:
    return Detections(
        boxes=np.array([[2.0, 3.0, 30.0, 40.0]]), scores=np.array([0.5]), labels=np.array([label])
    )


def search(world: World, folder: Path, *, on_image: Callable[[int, Detections], None] | None = None) -> None:
    search_to_file(
        world.detector,
        world.images,
        folder / "detections.json",
        source={},
        existing="resume",
        on_progress=lambda *_: None,
        on_image=on_image,
    )


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of file.

    Attributes:
        prepare: writes the undamaged files to a folder.
        pattern: of the files in it that are damaged, one at a time.
        mutate: damages one of them.
        uses: read the files as the commands do, each independent of the others; they assert that the values fit.
        command: the arguments of a command that reads the files.
    """

    prepare: Callable[[World, Path], None]
    pattern: str
    mutate: Mutation
    uses: tuple[Callable[[World, Path], object], ...]
    command: Callable[[World, Path], list[object]] | None = None


def copy_run(world: World, folder: Path) -> None:
    shutil.copytree(world.root / "run", folder, dirs_exist_ok=True)


def use_experiment(world: World, folder: Path) -> None:
    path = folder / "config.yaml"
    spec = load_experiment(path)
    assert parse_experiment(dump_experiment(spec), source=path) == spec


def use_as_data(world: World, folder: Path) -> None:
    is_experiment(folder / "config.yaml")


def use_as_partial(world: World, folder: Path) -> None:
    load_partial(folder / "config.yaml")


def use_detector(world: World, folder: Path) -> None:
    Detector.load(folder, "cpu")


def predict(world: World, folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    detections = Detector.load(folder, "cpu", checkpoint="last").predict(pixels)
    assert np.isfinite(detections.boxes).all()
    assert np.isfinite(detections.scores).all()


def use_checkpoint(world: World, folder: Path) -> None:
    run = Run.open(folder)
    assert 0 < run.progress.step == int(run.checkpoints[-1].name)
    run.check_trained_on(world.dataset.identity)
    learner = Learner(world.spec, num_classes=2, device=CPU, has_weights=False)
    learner.load(run, world.dataset.identity)


def use_optimizer(world: World, folder: Path) -> None:
    run = Run.open(folder)
    checkpoint = run.load_checkpoint(world.dataset.identity)
    assert checkpoint is not None
    model = build_detector(world.spec.model, num_classes=2, has_weights=False)
    optimizer = build_optimizer(world.spec.train, model)
    fill_module(model, checkpoint.weights, source=run.checkpoints[-1] / WEIGHTS)
    fill_optimizer(optimizer, model, checkpoint.optimizer, source=run.checkpoints[-1] / OPTIMIZER)
    states = [(parameter, value) for parameter, state in optimizer.state.items() for value in state.values()]
    assert all(value.shape in ((), parameter.shape) for parameter, value in states)
    assert all(
        value.isfinite().all() for value in (*model.state_dict().values(), *(value for _, value in states))
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


def use_as_start(world: World, folder: Path) -> None:
    weights = InitialWeights.load(folder)
    weights.check(world.spec, world.dataset.categories)
    model = build_detector(world.spec.model, num_classes=2, has_weights=False)
    InitialWeights.load(Run.open(folder).checkpoints[-1] / WEIGHTS).load_into(model, world.dataset.categories)


def write_table(world: World, folder: Path) -> None:
    rng = np.random.default_rng(0)
    table = choose_positive_chips(world.dataset, SMALL_PYRAMID, generator=rng)
    table.merge(replace(table, is_negative=~table.is_negative)).save(
        folder / "chips.npz", pyramid=SMALL_PYRAMID, digest=world.dataset.digest
    )


def use_table(world: World, folder: Path) -> None:
    table = ChipTable.load(
        folder / "chips.npz",
        pyramid=SMALL_PYRAMID,
        images=to_image_boxes(world.dataset),
        digest=world.dataset.digest,
    )
    assert table.offsets[-1] == len(table) == table.chips_per_level.sum()
    order = order_chips(world.dataset, SMALL_PYRAMID, batch_size=4, flip=0.5, seed=0, epoch=0, table=table)
    for batch in load_batches(order, world.spec.data, steps=range(order.num_steps)):
        assert batch.images.shape[1:] == (3, 64, 64)


def table_command(world: World, folder: Path) -> list[object]:
    experiment = folder / "experiment.yaml"
    experiment.write_text((world.root / "run" / "config.yaml").read_text())
    return [
        "train",
        experiment,
        "--run",
        folder / "new",
        "--data.chips",
        folder / "chips.npz",
        "--train.epochs",
        0.01,
    ]


def draw_proposals(world: World, index: int) -> Detections:
    rng = np.random.default_rng(index)
    low = rng.uniform(0, 0.8, (60, 2))
    sides = np.array([world.dataset.widths[index], world.dataset.heights[index]] * 2)
    boxes = np.concatenate([low, low + rng.uniform(0.02, 0.2, low.shape)], axis=1) * sides
    return Detections(boxes=boxes, scores=rng.uniform(0, 1, 60), labels=np.zeros(60, dtype=np.int64))


def write_proposals(world: World, folder: Path) -> None:
    store = start_proposals(folder, world.dataset, source={})
    with store.new_part() as part:
        for index in store.missing:
            part.write(index, None if index == 2 else draw_proposals(world, index))


def use_proposals(world: World, folder: Path) -> None:
    positives = choose_positive_chips(world.dataset, SMALL_PYRAMID, generator=np.random.default_rng(0))
    table = add_negatives(
        positives,
        open_proposals(folder, world.dataset),
        NegativeSpec(min_proposals=(2,)),
        pyramid=SMALL_PYRAMID,
        generator=np.random.default_rng(0),
    )
    assert len(table) >= len(positives)


def continue_proposals(world: World, folder: Path) -> None:
    store = start_proposals(folder, world.dataset, source={})
    search_images(
        store,
        lambda indices: [draw_proposals(world, index) for index in indices],
        processes=SINGLE_PROCESS,
        on_progress=lambda *_: None,
    )


def proposals_command(world: World, folder: Path) -> list[object]:
    return ["chips", world.dataset.path, "--proposals", folder, "-o", folder.with_name("out.npz")]


class Stopped(Exception):
    """Ends a search."""


def write_detections(world: World, folder: Path) -> None:
    def stop(index: int, detections: Detections) -> None:
        if index == 2:
            raise Stopped

    with suppress(Stopped):
        search(world, folder, on_image=stop)


def use_stored_detections(world: World, folder: Path) -> None:
    search(world, folder)
    assert len(load_detections(folder / "detections.json")) > 0


def write_results(world: World, folder: Path) -> None:
    search(world, folder)


def use_results(world: World, folder: Path) -> None:
    table = load_detections(folder / "detections.json")
    assert np.isfinite(table.boxes).all()
    scores = evaluate(folder / "detections.json", world.dataset)
    assert -1 <= scores.ap <= 1


def use_source(world: World, folder: Path) -> None:
    match = match_categories(world.dataset.categories, ())
    found = find_results(world.detector, world.images, [folder / "detections.json"], match=match, source={})
    assert found is None or all(isinstance(each, int | str) for each in found.skipped)


def results_command(world: World, folder: Path) -> list[object]:
    return ["evaluate", folder / "detections.json", world.dataset.path]


def resume(world: World, folder: Path) -> None:
    """Continue a run that is complete: everything is read, and no step is made."""
    train_run(Run.open(folder), world.spec, world.dataset)


def use_metrics(world: World, folder: Path) -> None:
    run = Run.open(folder)
    assert all(entry["step"] >= 0 for entry in run.entries())
    step = int(run.checkpoints[-1].name)
    assert all(evaluation.ap <= 1 for evaluation in run.evaluations)
    assert run.best is None or run.best in run.evaluations
    for entry in (run.best_scores(), run.final_scores(step), run.epoch_means(step)):
        assert entry is None or entry == {} or entry["step"] >= 0


def calibration(step: int) -> Calibration:
    return Calibration(
        step=step, num_images=4, num_compared=4, merge="hard", soft_nms_sigma=0.5, merge_iou=0.5, min_score=0.3,
        f1=0.6, precision=0.7, recall=0.5,
    )  # fmt: skip


def use_calibration(world: World, folder: Path) -> None:
    run = Run.open(folder)
    chosen = load_calibration(run, step=int(run.checkpoints[-1].name))
    assert chosen is None or chosen.min_score is None or 0 <= chosen.min_score <= 1
    save_calibration(run, calibration(int(run.checkpoints[0].name)))


def read_chips(world: World, folder: Path) -> list[np.ndarray]:
    table = choose_positive_chips(world.dataset, SMALL_PYRAMID, generator=np.random.default_rng(0))
    reader = ChipReader(cache=CacheSpec(folder=str(folder), format="png"))
    indices = range(0, len(table), 2)
    return [reader.read(world.dataset[int(table.image_indices[i])].path, table.chip(i)) for i in indices]


def write_cache(world: World, folder: Path) -> None:
    read_chips(world, folder)


def use_cache(world: World, folder: Path) -> None:
    for pixels, expected in zip(read_chips(world, folder), read_chips(world, folder / "new"), strict=True):
        np.testing.assert_array_equal(pixels, expected)


def predict_command(world: World, folder: Path) -> list[object]:
    return ["predict", folder, world.images[0].path, "--device", "cpu"]


def resume_command(world: World, folder: Path) -> list[object]:
    return ["train", world.root / "run" / "config.yaml", "--run", folder, "--resume", "--device", "cpu"]


KINDS = {
    "experiment": Kind(
        prepare=copy_run,
        pattern="config.yaml",
        mutate=both(mutations.mutate_yaml),
        uses=(use_experiment, use_as_data, use_as_partial, use_detector),
        command=predict_command,
    ),
    "chip table": Kind(
        prepare=write_table,
        pattern="chips.npz",
        mutate=both(mutations.mutate_npz),
        uses=(use_table,),
        command=table_command,
    ),
    "proposals": Kind(
        prepare=write_proposals,
        pattern="*.boxes",
        mutate=both(mutations.mutate_records),
        uses=(use_proposals, continue_proposals),
        command=proposals_command,
    ),
    "head of proposals": Kind(
        prepare=write_proposals,
        pattern="head.json",
        mutate=both(mutations.mutate_json),
        uses=(use_proposals, continue_proposals),
    ),
    "stored detections": Kind(
        prepare=write_detections,
        pattern=".detections.json.parts/*.boxes",
        mutate=both(mutations.mutate_records),
        uses=(use_stored_detections,),
    ),
    "checkpoint": Kind(
        prepare=copy_run,
        pattern="checkpoints/*/*.safetensors",
        mutate=both(mutations.mutate_safetensors),
        uses=(use_checkpoint, use_optimizer, use_as_start, predict),
        command=resume_command,
    ),
    "metrics": Kind(
        prepare=copy_run,
        pattern="metrics.jsonl",
        mutate=both(mutations.mutate_lines),
        uses=(use_metrics, use_detector, resume),
        command=resume_command,
    ),
    "calibration": Kind(
        prepare=copy_run,
        pattern="calibration.json",
        mutate=both(mutations.mutate_json),
        uses=(use_calibration, use_detector),
        command=predict_command,
    ),
    "results": Kind(
        prepare=write_results,
        pattern="detections.json",
        mutate=both(mutations.mutate_json),
        uses=(use_results,),
        command=results_command,
    ),
    "source of results": Kind(
        prepare=write_results,
        pattern=".detections.json.source",
        mutate=both(mutations.mutate_json),
        uses=(use_source,),
    ),
    "chip cache": Kind(
        prepare=write_cache,
        pattern="chips.sqlite",
        mutate=both(mutations.mutate_database),
        uses=(use_cache,),
    ),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    dataset = load_dataset(write_dataset(root))
    spec = with_train(tiny_experiment(dataset.path), optimizer="adamw", ema_decay=0.9, keep_checkpoints=2)
    run = Run.create(root / "run", config=dump_experiment(spec))
    train_run(run, spec, dataset)
    for path, ap in zip(run.checkpoints, (0.3, 0.2), strict=True):
        step = int(path.name)
        run.log({"stage": "evaluate", "step": step, "epoch": 1.0, "ap": ap, "ap50": ap, "num_images": 4})
        save_calibration(run, calibration(step))
    world = World(root=root, dataset=dataset, spec=spec)
    for name, kind in KINDS.items():
        folder = root / name
        folder.mkdir()
        kind.prepare(world, folder)
    return world


@pytest.fixture
def limited_memory() -> Iterator[None]:
    """Limit what the process may reserve beyond what it has."""
    kilobytes = re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())
    assert kilobytes is not None
    _, hard = before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (int(kilobytes[1]) * 1024 + MAX_BYTES, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def attempt(use: Callable[..., object], *arguments: object, folder: Path) -> str:
    """Return `read`, `refused`, or what went wrong."""
    started = time.process_time()
    result = "read"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            use(*arguments)
        except SniperError as error:
            result = "refused"
            if str(folder) not in str(error):
                result = f"the error does not name the file: {error}"
        except Exception as error:  # what the campaign searches for
            last = traceback.extract_tb(error.__traceback__)[-1]
            result = f"{type(error).__name__}: {str(error)[:150]} ({Path(last.filename).name}:{last.lineno})"
    foreign = [str(warning.message) for warning in caught if str(folder) not in str(warning.message)]
    if foreign:
        return f"a warning of a library: {foreign[0]}"
    if time.process_time() - started > MAX_SECONDS:
        return "slow"
    return result


def use_all(kind: Kind, world: World, folder: Path) -> dict[str, str]:
    """Read the files of a folder in every way, each time as they are at the start; return what comes of it."""
    results: dict[str, str] = {}
    copies = folder.with_name("copies")
    shutil.copytree(folder, copies)
    for use in kind.uses:
        results[use.__name__] = attempt(use, world, folder, folder=folder)
        shutil.rmtree(folder)
        shutil.copytree(copies, folder)
    shutil.rmtree(copies)
    return results


def run_or_refuse(arguments: list[object]) -> None:
    assert run_command([*map(str, arguments)]) in (0, 2)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is limited on Linux only")
@pytest.mark.usefixtures("limited_memory")
@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_read_or_refused(
    name: str,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    record_property: Callable[[str, Any], None],
) -> None:
    kind, counts, faults = KINDS[name], Counter[str](), list[str]()
    folder = tmp_path / "damaged"
    shutil.copytree(world.root / name, folder)
    assert set(use_all(kind, world, folder).values()) == {"read"}  # before it is damaged
    for number in range(NUM_MUTATIONS):
        shutil.rmtree(folder)
        shutil.copytree(world.root / name, folder)
        generator = Random(f"{SEED}/{name}/{number}")
        path = generator.choice(sorted(folder.glob(kind.pattern)))
        path.write_bytes(kind.mutate(generator, path.read_bytes()))
        results = use_all(kind, world, folder)
        if kind.command is not None and number % COMMAND_EVERY == 0:
            arguments = kind.command(world, folder)
            results["command"] = attempt(run_or_refuse, arguments, folder=folder)
            (tmp_path / "out.npz").unlink(missing_ok=True)
        wrong = [
            f"{number}, {path.name}, {use}: {result}"
            for use, result in results.items()
            if result not in ("read", "refused")
        ]
        faults += wrong
        counts["fault" if wrong else "refused" if "refused" in results.values() else "read"] += 1
    line = f"{name}: {counts['read']} read, {counts['refused']} refused, {counts['fault']} faults"
    record_property("outcome", line)
    with capsys.disabled():
        print(f"\n{line}")  # noqa: T201 - the figures of the campaign
    assert not faults, "\n".join([line, *faults])
