"""The folder of a run for which none is named."""

import os
from pathlib import Path

from sniper.files import expand_path


def default_run(source: str | os.PathLike[str]) -> Path:
    """Return `runs/NAME`, after the file, the folder or the recipe that is trained.

    Raises:
        ConfigError: if the path has an environment variable that is not defined.
    """
    path = expand_path(source)
    return Path("runs") / (path.resolve().name if path.is_dir() else path.stem)
