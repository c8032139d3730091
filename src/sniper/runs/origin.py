"""Where a run comes from: machine, software, command and commit, as text for people and trackers."""

import os
import platform
import shlex
import socket
import subprocess
import sys
from pathlib import Path

from sniper.remote import redact
from sniper.runs.environment import Environment

_SECONDS = 5.0  # for git, which may wait for a network disk


def describe_origin(environment: Environment) -> dict[str, str]:
    """Return what computes a run, the command, and the git commit of the working folder, by name.

    What is not known is left out, such as the commit outside a repository or without git.

    Args:
        environment: of this process.
    """
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    origin = {
        "command": redact(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])),
        "folder": os.fspath(Path.cwd()),
        "host": socket.gethostname(),
        "device": environment.device_name,
        "processes": str(environment.world_size),
        "precision": environment.precision,
        "python": platform.python_version(),
        **environment.versions,
    }
    if commit:
        origin["git_commit"] = commit
        origin["git_has_changes"] = str(bool(changes)).lower()
    return origin


def _git(*arguments: str) -> str | None:
    """Return the output of git; None if there is none, or it fails."""
    try:
        result = subprocess.run(
            ["git", *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
