"""Find a detector of transformers: in a folder, in the cache of the Hugging Face hub, or on its server."""

import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub

from sniper.errors import ConfigError, WeightsError
from sniper.models.spec import DetectorSpec

CONFIG = "config.json"

_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_SECONDS_TO_ANSWER = 5.0
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")  # of a repository


def import_transformers() -> Any:
    """Import transformers.

    Raises:
        ConfigError: if it, or SciPy, which its losses need, is not installed.
    """
    try:
        import scipy  # noqa: F401 - of the losses of transformers
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"model.kind: transformers needs the package {error.name}: pip install 'sniper-det[transformers]'"
        ) from error
    return transformers


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from printing reports and progress in the block."""
    logging = import_transformers().utils.logging
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


def check_available(spec: DetectorSpec) -> None:
    """Check that what a detector is made from is on this machine, or that the hub's server answers.

    Raises:
        ConfigError: if transformers is not installed, or the name is neither a folder nor that of a detector.
        WeightsError: if the folder has no weights; or if something must be downloaded and the server does not answer
            within a few seconds.
    """
    name, options = str(spec.name), spec.transformers
    import_transformers()
    if Path(name).is_dir():
        if options.config is None and not (Path(name) / CONFIG).is_file():
            raise ConfigError(
                f"model.name: {name}: has no {CONFIG}; expected a folder that save_pretrained has written"
            )
        if spec.starts_from_library and find_weights(name) is None:
            raise WeightsError(
                f"model.name: {name}: has no weights ({_WEIGHTS[0]}); start from random ones "
                "(--model.transformers.pretrained false)"
            )
        return
    if _NAME.fullmatch(name) is None:
        raise ConfigError(
            f"model.name: {name}: no such folder; expected a folder, or a name on the Hugging Face hub, such as "
            "PekingU/rtdetr_v2_r18vd"
        )
    missing = _missing(spec)
    if missing is not None:
        _check_server(missing)


def find_download(spec: DetectorSpec) -> str | None:
    """Describe what must be downloaded; None if there is nothing. Uses no network."""
    return _missing(spec)


def find_weights(name: str) -> Path | None:
    """Return the file of the weights of a detector, or the index of its files, if it is on this machine."""
    return next((path for path in (_find(name, file) for file in _WEIGHTS) if path is not None), None)


def _missing(spec: DetectorSpec) -> str | None:
    name = str(spec.name)
    if spec.starts_from_library and find_weights(name) is None:
        return f"weights of {name}"
    if spec.transformers.config is None and _find(name, CONFIG) is None:
        return f"configuration of {name}"
    return None


def _find(name: str, file: str) -> Path | None:
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    cached = huggingface_hub.try_to_load_from_cache(name, file)
    return Path(cached) if isinstance(cached, str) else None


def _check_server(missing: str) -> None:
    endpoint = huggingface_hub.constants.ENDPOINT
    try:
        with urllib.request.urlopen(
            urllib.request.Request(endpoint, method="HEAD"), timeout=_SECONDS_TO_ANSWER
        ):
            pass
    except urllib.error.HTTPError:  # it answers
        pass
    except OSError as error:
        raise WeightsError(
            f"{missing}: must be downloaded, and {endpoint} cannot be reached ({getattr(error, 'reason', error)}); "
            "name a folder that has it (--model.name FOLDER)"
        ) from error
