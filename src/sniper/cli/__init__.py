"""The command line."""

from sniper.cli.main import main, run

__all__ = ["main", "run"]
