"""The stages of an experiment: a short training of the RPN, mining with it, and the training proper (SNIPER §3.2).

Each stage goes on where it was stopped, and is not run again while what it depends on is the same.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from sniper.chips import ChipTable
from sniper.chips.negatives import NegativeSpec
from sniper.config import check_resumable, dump_experiment, load_experiment
from sniper.data.coco import Annotations
from sniper.data.plan import build_table
from sniper.data.proposals import add_negatives
from sniper.engine.mine import mine
from sniper.engine.run import Run
from sniper.engine.spec import ExperimentSpec, MineSpec
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
        run: its folder. The RPN's training is a run of its own in `rpn` there, its proposals are in `proposals`.
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
    rpn_spec = rpn_experiment(spec)
    rpn_run = _begun(run.folder / "rpn", rpn_spec, annotations)
    train(rpn_run, rpn_spec, annotations, device=device, watch=watch)

    def mined_table(epoch: int) -> ChipTable:
        """Give the chips of an epoch; at the start of every round, mine with the newest weights."""
        round_start = (
            epoch // spec.mine.every_epochs * spec.mine.every_epochs if spec.mine.every_epochs else 0
        )
        path = run.folder / f"chips_{round_start:03d}.npz"
        if path.exists():
            return ChipTable.load(path, pyramid=spec.pyramid, digest=annotations.digest)
        started = time.monotonic()
        store = mine(
            rpn_run if round_start == 0 else run,
            spec,
            annotations,
            run.folder / "proposals",
            device=device,
            watch=watch_mining,
        )
        generator = np.random.default_rng([spec.seed, round_start, 1])
        positives = build_table(annotations, spec.pyramid, generator=generator)
        table = add_negatives(positives, store, spec.negatives, generator=generator)
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
        table.save(path)
        return table

    return train(run, spec, annotations, device=device, watch=watch, table_of=mined_table)


def rpn_experiment(spec: ExperimentSpec) -> ExperimentSpec:
    """Give the experiment that trains the RPN alone, on positive chips, to mine with; how to mine is no part of it."""
    return replace(
        spec,
        train=replace(spec.train, epochs=spec.mine.rpn_epochs, rpn_only=True),
        negatives=NegativeSpec(),
        mine=MineSpec(),
    )


def _begun(folder: Path, spec: ExperimentSpec, annotations: Annotations) -> Run:
    """Find the run of a stage, or begin it; one that was begun otherwise is begun anew."""
    if (folder / "config.yaml").is_file():
        opened = Run.open(folder)
        if _is_same(opened, spec) and opened.learnt_from(annotations):
            return opened
        shutil.rmtree(folder)
    return Run.create(folder, config=dump_experiment(spec))


def _is_same(run: Run, spec: ExperimentSpec) -> bool:
    """Tell whether a run was begun as it would be now."""
    try:
        old = load_experiment(run.config_path)
        check_resumable(old, spec, source=run.config_path)
    except ConfigError:
        return False
    return old.train.epochs == spec.train.epochs
