"""Set up all tests: one thread, annotations checked at every call, no deadlines, kernels compiled once."""

import inspect
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
os.environ.setdefault("NUMBA_NUM_THREADS", "1")  # before numba is imported

import beartype
import hypothesis
import jaxtyping
import numba
import pytest

if TYPE_CHECKING:
    from sniper.config.experiment import ExperimentSpec
    from sniper.data.datasets import Dataset
    from tests.training.experiments import TrainedRun

# A shell starts pytest in the background with these ignored, and commands that tests start would inherit that.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

hypothesis.settings.register_profile("sniper", deadline=None)
hypothesis.settings.load_profile("sniper")


def _without_checks(compile_function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a decorator of numba, so that it compiles the bare function: numba cannot compile the checks."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if args and callable(args[0]):
            return compile_function(inspect.unwrap(args[0]), *args[1:], **kwargs)
        decorate = compile_function(*args, **kwargs)
        return lambda function: decorate(inspect.unwrap(function))

    return wrapper


# An int is accepted where a float is expected; Self cannot be checked method by method.
_ANNOTATIONS = beartype.BeartypeConf(is_pep484_tower=True, hint_overrides=beartype.FrozenDict({Self: object}))


def check_annotations(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check the annotations of a function of the package at every call."""
    return beartype.beartype(conf=_ANNOTATIONS)(function)


numba.njit = _without_checks(numba.njit)
jaxtyping.install_import_hook("sniper", f"{__name__}.check_annotations")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Compile the kernels before pytest-xdist starts its processes, which would each compile them."""
    has_workers = bool(getattr(session.config.option, "numprocesses", None))
    if has_workers and not hasattr(session.config, "workerinput"):
        from tests.kernels import compile_kernels

        compile_kernels()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Limit torch to one thread; tests that do not need torch do not import it."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture
def dataset(tmp_path: Path) -> "Dataset":
    """A tiny data set, written for the test."""
    from sniper.data.datasets import load_dataset
    from tests.data.tiny import write_dataset

    return load_dataset(write_dataset(tmp_path / "world"))


@pytest.fixture
def spec(dataset: "Dataset") -> "ExperimentSpec":
    """An experiment on the tiny data set that trains in a second."""
    from tests.training.experiments import tiny_experiment

    return tiny_experiment(dataset.path)


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> "TrainedRun":
    """A complete run of the tiny experiment, for tests that only read it."""
    from tests.training.experiments import train_tiny

    return train_tiny(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def trained(trained_once: "TrainedRun", tmp_path: Path) -> "TrainedRun":
    """A copy of a complete run of the tiny experiment, which a test may change or continue."""
    from sniper.runs.run import Run

    folder = tmp_path / "trained"
    shutil.copytree(trained_once.run.folder, folder)
    return replace(trained_once, run=Run(folder))


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bound differences of scores by 100 draws of images instead of 1,000."""
    from sniper.evaluation import comparison

    monkeypatch.setattr(comparison, "compare", partial(comparison.compare, num_resamples=100))
    fewer = partial(comparison.resample, num_resamples=100)
    monkeypatch.setattr("sniper.reports.comparison_page.resample", fewer)
