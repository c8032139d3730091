"""Hold the locks of what a command writes while it runs."""

import inspect
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from functools import wraps
from typing import ParamSpec

_P = ParamSpec("_P")


def locking(
    choose: Callable[..., Iterable[AbstractContextManager[None]]],
) -> Callable[[Callable[_P, None]], Callable[_P, None]]:
    """Build a decorator that holds locks while a command runs.

    They are taken before the command imports or reads anything, so that a second command is refused at once.

    Args:
        choose: returns the locks; called with all arguments of the command by name.
    """

    def decorate(command: Callable[_P, None]) -> Callable[_P, None]:
        signature = inspect.signature(command)

        @wraps(command)
        def run(*args: _P.args, **kwargs: _P.kwargs) -> None:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            with ExitStack() as stack:
                for lock in choose(**bound.arguments):
                    stack.enter_context(lock)
                command(*args, **kwargs)

        return run

    return decorate
