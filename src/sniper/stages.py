"""The stages of an experiment: a short training of the RPN, mining with it, and the training proper (SNIPER §3.2).

Each stage goes on where it was stopped, and is not run again while what it depends on is the same.
"""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from sniper.chips import ChipTable
from sniper.chips.negatives import NegativeSpec
from sniper.config import dump_experiment, load_experiment
from sniper.data.coco import Annotations
from sniper.data.plan import build_table
from sniper.data.proposals import add_negatives
from sniper.data.spec import SourceSpec
from sniper.engine.mine import mine
from sniper.engine.run import Run
from sniper.engine.spec import ExperimentSpec, MineSpec, PredictSpec
from sniper.engine.train import StepReport, train
from sniper.errors import ConfigError
from sniper.models.detector import Detector


def train_experiment(
    run: Run,
    spec: ExperimentSpec,
    annotations: Annotations,
    *,
    device: torch.device,
    watch: Callable[[StepReport], None],
    watch_mining: Callable[[int, int], None],
) -> Detector:
    """Run all stages that an experiment asks for; what is raised is what `train` and `mine` raise.

    Args:
        run: its folder. The RPN's training is a run of its own in `rpn` there, what is mined is in `mined`.
        spec: the experiment.
        annotations: what to train on.
        device: where to compute.
        watch: told after every step.
        watch_mining: told how many images are searched, and how many there are.

    Returns:
        The trained detector.
    """
    if spec.negatives.source == "none":
        return train(run, spec, annotations, device=device, watch=watch)
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
            source = _begun(run.folder / "rpn", rpn_experiment(spec), annotations)
            train(source, rpn_experiment(spec), annotations, device=device, watch=watch)
        started = time.monotonic()
        store = mine(source, spec, annotations, run.folder / "mined", device=device, watch=watch_mining)
        generator = np.random.default_rng([spec.seed, round_start, 1])
        positives = build_table(annotations, spec.pyramid, generator=generator)
        table = add_negatives(positives, store, spec.negatives, generator=generator)
        table.save(path)
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
        return table

    if not run.checkpoints:
        mined_table(0)  # before the detector takes its place in memory
    return train(run, spec, annotations, device=device, watch=watch, table_of=mined_table)


def rpn_experiment(spec: ExperimentSpec) -> ExperimentSpec:
    """Give the experiment that trains the RPN alone, on positive chips, to mine with."""
    return replace(
        spec,
        train=replace(spec.train, epochs=spec.mine.rpn_epochs, rpn_only=True),
        negatives=NegativeSpec(),
    )


def _begun(folder: Path, spec: ExperimentSpec, annotations: Annotations) -> Run:
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
        data=replace(spec.data, train=SourceSpec(), test=SourceSpec(), loader_processes=0),
        train=replace(spec.train, checkpoint_minutes=1.0, keep_checkpoints=1),
        mine=MineSpec(),
        predict=PredictSpec(),
    )
