"""What holds for every test: one thread, shape annotations that are executed, no deadlines."""

import inspect
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import beartype
import hypothesis
import jaxtyping
import numba
import pytest

if TYPE_CHECKING:
    from tests.training.experiments import TrainedRun

hypothesis.settings.register_profile("sniper", deadline=None)
hypothesis.settings.load_profile("sniper")


def _of_bare_functions(compile_function: Callable[..., Any]) -> Callable[..., Any]:
    """Let numba see through the checks of the import hook, which it cannot compile."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if args and callable(args[0]):
            return compile_function(inspect.unwrap(args[0]), *args[1:], **kwargs)
        decorate = compile_function(*args, **kwargs)
        return lambda function: decorate(inspect.unwrap(function))

    return wrapper


# An int is welcome where a float is asked for; Self cannot be checked method by method.
_ANNOTATIONS = beartype.BeartypeConf(is_pep484_tower=True, hint_overrides=beartype.FrozenDict({Self: object}))


def check_annotations(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function of the package refuse what its annotations do not allow."""
    return beartype.beartype(conf=_ANNOTATIONS)(function)


numba.njit = _of_bare_functions(numba.njit)
jaxtyping.install_import_hook("sniper", f"{__name__}.check_annotations")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Keep torch on one thread; tests that do not need it are not made to import it."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


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
