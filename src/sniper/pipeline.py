"""The stages of an experiment: a short training of the RPN, mining with it, and the training proper (SNIPER §3.2).

Each stage goes on where it was stopped, and is not run again while what it depends on is the same.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from sniper.chips import ChipTable
from sniper.chips.negatives import NegativeSpec
from sniper.config.experiment import ExperimentSpec, MineSpec, PredictSpec
from sniper.config.loading import dump_experiment, load_experiment
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.epoch import build_table
from sniper.data.spec import SourceSpec
from sniper.errors import AnnotationError, ConfigError
from sniper.evaluation.coco import evaluate
from sniper.inference.detector import Detector, to_coco
from sniper.inference.mining import mine
from sniper.inference.proposals import ProposalStore, add_negatives
from sniper.models.two_stage import TwoStageDetector
from sniper.runs.processes import SINGLE_PROCESS, Processes
from sniper.runs.run import Run
from sniper.training.loop import StepReport, train


def train_experiment(
    run: Run,
    spec: ExperimentSpec,
    annotations: Dataset,
    *,
    device: torch.device,
    watch: Callable[[StepReport], None],
    watch_mining: Callable[[int, int], None],
    watch_scores: Callable[[float, Mapping[str, float]], None] = lambda epoch, scores: None,
    ranks: Processes = SINGLE_PROCESS,
) -> TwoStageDetector:
    """Run all stages that an experiment asks for; what is raised is what `train` and `mine` raise.

    Args:
        run: its folder. The RPN's training is a run of its own in `rpn` there, what is mined is in `mined`.
        spec: the experiment.
        annotations: what to train on.
        device: where to compute.
        watch: told after every step.
        watch_mining: told how many images are searched, and how many there are.
        watch_scores: told the scores on the test images after so many epochs.
        ranks: the processes that train together; all call this.

    Returns:
        The trained detector.

    Raises:
        ConfigError: also if the experiment is to be scored and names no test images.
        AnnotationError: also if the test images have other categories than those trained on.
    """
    score = _scorer(spec, annotations, device=device, ranks=ranks, watch=watch_scores)
    if spec.negatives.source == "none":
        return train(run, spec, annotations, device=device, watch=watch, score=score, ranks=ranks)
    run.check_learnt_from(annotations)

    def mined_table(epoch: int) -> ChipTable:
        """Give the chips of an epoch; at the start of every round, mine with the newest weights."""
        every = spec.mine.every_epochs
        round_start = epoch // every * every if every else 0
        path = run.folder / f"chips_{round_start:03d}.npz"
        if path.exists():
            return ChipTable.load(path, pyramid=spec.pyramid, digest=annotations.digest)
        source = run
        if round_start == 0:
            source = Run(run.folder / "rpn")
            if ranks.is_first:
                source = _begun(source.folder, rpn_experiment(spec), annotations)
            ranks.wait()
            train(source, rpn_experiment(spec), annotations, device=device, watch=watch, ranks=ranks)
        started = time.monotonic()
        store = mine(
            source,
            spec,
            annotations,
            run.folder / "mined",
            device=device,
            watch=watch_mining,
            share=(ranks.rank, ranks.count),
        )
        ranks.wait()
        if ranks.is_first:
            keep_table(path, store, round_start=round_start, started=started)
        ranks.wait()
        return ChipTable.load(path, pyramid=spec.pyramid, digest=annotations.digest)

    def keep_table(path: Path, store: ProposalStore, *, round_start: int, started: float) -> None:
        generator = np.random.default_rng([spec.seed, round_start, 1])
        positives = build_table(annotations, spec.pyramid, generator=generator)
        table = add_negatives(positives, store, spec.negatives, pyramid=spec.pyramid, generator=generator)
        table.save(path, pyramid=spec.pyramid, digest=annotations.digest)
        run.log(
            {
                "stage": "mine",
                "step": int(run.checkpoints[-1].name) if run.checkpoints else 0,
                "images": len(annotations),
                "positive_chips": len(positives),
                "negative_chips_pool": len(table) - len(positives),
                "seconds": round(time.monotonic() - started, 3),
            }
        )

    if not run.checkpoints:
        mined_table(0)  # before the detector takes its place in memory
    return train(
        run,
        spec,
        annotations,
        device=device,
        watch=watch,
        table_of=mined_table,
        score=score,
        ranks=ranks,
    )


def _scorer(
    spec: ExperimentSpec,
    annotations: Dataset,
    *,
    device: torch.device,
    ranks: Processes,
    watch: Callable[[float, Mapping[str, float]], None],
) -> Callable[[TwoStageDetector, float], Mapping[str, float]] | None:
    """Give what scores a detector on the test images, each process searching its share; None if that is not wanted."""
    if spec.train.evaluate_every is None:
        return None
    if not spec.data.test.annotations:
        raise ConfigError("train.evaluate_every: data.test.annotations is missing")
    source = spec.data.test
    root = None if source.images is None else Path(source.images)
    test = load_dataset(
        Path(source.annotations),
        image_root=root,
        read=spec.data.read,
        skips_bad_images=spec.data.on_bad_image == "skip",
    )
    if test.categories != annotations.categories:
        raise AnnotationError(f"{test.path}: has other categories than {annotations.path}")
    truth = test.to_coco()

    def score(model: TwoStageDetector, epoch: float) -> Mapping[str, float]:
        predictor = Detector.of(model, spec=spec, categories=annotations.categories, device=device)
        records = [test[index] for index in range(ranks.rank, len(test), ranks.count)]
        own = []
        for record, found in zip(records, predictor.search(record.path for record in records), strict=True):
            if found is not None:
                own += to_coco(found, image_id=record.image_id, categories=predictor.categories)
        results = [entry for part in ranks.gather(own) for entry in part]
        scores = evaluate(results, truth).as_dict()
        if ranks.is_first:
            watch(epoch, scores)
        return scores

    return score


def rpn_experiment(spec: ExperimentSpec) -> ExperimentSpec:
    """Give the experiment that trains the RPN alone, on positive chips, to mine with."""
    return replace(
        spec,
        train=replace(spec.train, epochs=spec.mine.rpn_epochs, rpn_only=True, evaluate_every=None),
        negatives=NegativeSpec(),
    )


def _begun(folder: Path, spec: ExperimentSpec, annotations: Dataset) -> Run:
    """Find the run of a stage, or begin it; one that was begun otherwise is begun anew."""
    aside = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if (folder / "config.yaml").is_file():
        opened = Run.open(folder)
        if _is_same(opened, spec) and opened.learnt_from(annotations):
            return opened
        os.replace(folder, aside)  # it is no run any more before it stops being whole
        shutil.rmtree(aside)
    return Run.create(folder, config=dump_experiment(spec))


def _is_same(run: Run, spec: ExperimentSpec) -> bool:
    """Tell whether a run was begun as it would be now."""
    try:
        return _inputs(load_experiment(run.config_path)) == _inputs(spec)
    except ConfigError:
        return False


def _inputs(spec: ExperimentSpec) -> ExperimentSpec:
    """Leave out what the RPN's training does not depend on; the annotations themselves are compared by content."""
    return replace(
        spec,
        data=replace(
            spec.data,
            train=SourceSpec(),
            test=SourceSpec(),
            num_workers=0,
            on_bad_image="refuse",
            cache=replace(
                spec.data.cache, folder=None if spec.data.cache.folder is None else "", gigabytes=1.0
            ),
        ),
        train=replace(
            spec.train, checkpoint_minutes=1.0, keep_checkpoints=1, tensorboard=False, compile=False
        ),
        mine=MineSpec(),
        predict=PredictSpec(),
    )
