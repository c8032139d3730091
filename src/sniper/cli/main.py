"""The application: its commands, its errors and its exit codes.

Exit codes: 0 for success, 2 for a user error (explained in one paragraph), 1 for an internal error; 130, 143 and 129
for a command that SIGINT (Ctrl-C), SIGTERM or SIGHUP has stopped. With `--json` standard output contains one JSON
object and nothing else; progress and messages go to standard error. Commands import torch in their bodies, so that
`--help` is fast.
"""

import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from cyclopts import (
    App,
    CycloptsError,
    Parameter,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)
from rich.console import Console

from sniper import __version__
from sniper.cli.browse import browse
from sniper.cli.check import check
from sniper.cli.chips import chips
from sniper.cli.convert import convert
from sniper.cli.demo import demo
from sniper.cli.evaluate import evaluate
from sniper.cli.export import export
from sniper.cli.focus import focus
from sniper.cli.merge import merge
from sniper.cli.mine import mine
from sniper.cli.options import convert_argument
from sniper.cli.output import (
    STANDARD_OUTPUT,
    console,
    flush,
    print_error,
    print_progress,
    print_warnings,
)
from sniper.cli.plan import plan
from sniper.cli.predict import predict
from sniper.cli.recipes import recipes
from sniper.cli.report import report
from sniper.cli.train import train
from sniper.cli.unknown import OTHER_COMMANDS, Command, UnknownOption, explain_option
from sniper.errors import AnnotationError, ImageError, SniperError, explain_os_error, explain_shared_memory
from sniper.training.signals import SignalHandler, Stopped, ending_at_second_signal

app = App(
    name="sniper",
    help="Train and run object detectors on chips: small windows around the objects, each at a suitable scale.",
    version=__version__,
    version_flags=["--version"],
    console=Console(),
    error_console=console,
    help_format="plaintext",
    group_parameters="Options",
    suppress_keyboard_interrupt=False,
    default_parameter=Parameter(converter=convert_argument),
)

_COMMANDS: dict[Callable[..., None], str] = {
    plan: "ANNOTATIONS",
    check: "ANNOTATIONS",
    browse: "DATA",
    convert: "SOURCE OUT --to FORMAT",
    chips: "ANNOTATIONS -o FILE | DATA --to FORMAT OUT [--pyramid.FIELD VALUE]... [--data.FIELD VALUE]...",
    train: "DATA [--SECTION.FIELD VALUE]...",
    mine: "RUN [ANNOTATIONS] | ANNOTATIONS --from FILE",
    predict: "RUN [FILES]... [--predict.FIELD VALUE]... [--data.read.FIELD VALUE]...",
    evaluate: "RUN [ANNOTATIONS] [--predict.FIELD VALUE]... [--data.read.FIELD VALUE]... | DETECTIONS ANNOTATIONS",
    focus: "RUN [DATA]",
    export: "RUN MODEL [--predict.FIELD VALUE]... [--data.read.FIELD VALUE]...",
    merge: "DETECTIONS --manifest CHIPS -o FILE [--predict.FIELD VALUE]...",
    report: "RUN [RUN]...",
    recipes: "",
    demo: "",
}
"""Commands in the order of their use, and their arguments as the help shows them."""

for _position, (_command, _arguments) in enumerate(_COMMANDS.items()):
    _paragraphs = (_command.__doc__ or "").split("\n\n")
    app.command(
        _command,
        help="\n\n".join(" ".join(paragraph.split()) for paragraph in _paragraphs),
        usage=f"Usage: sniper {_command.__name__} [OPTIONS] {_arguments}".rstrip(),
        sort_key=_position,
    )


def main() -> None:
    """Run the command line and exit."""
    warnings.showwarning = _show_warning
    if isinstance(sys.stdout, io.TextIOWrapper):  # names may have characters that an older terminal lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    signals = SignalHandler()
    announce = partial(_announce_stop, signals)
    with signals.installed(), ending_at_second_signal(on_first=announce, on_second=_show_cursor):
        try:
            code = run(sys.argv[1:])
        except BaseException:
            if not signals.stop_requested:
                raise
            code = 1  # a library, or a terminal that was closed, did not bear the interrupt
        if code and signals.stopped_by is not None:
            code = Stopped(signals.stopped_by).exit_code
        # Under torchrun the other processes may be waiting for this one in a collective call. After a signal, threads
        # may still be reading images.
        if code and (signals.stop_requested or not _is_alone()):
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError):
                    stream.flush()
            os._exit(code)
    sys.exit(code)


def _announce_stop(signals: SignalHandler, number: int) -> None:
    """Print what happens after a first signal, if that takes time."""
    if number == signal.SIGHUP:
        _detach_from_closed_terminal()
    if signals.is_deferring and os.environ.get("RANK", "0") == "0":
        print_progress(
            f"{signal.Signals(number).name}: the step in progress is completed and saved; a second signal ends the "
            "command at once"
        )


def _show_cursor() -> None:
    """Show the cursor of the terminal again, which a progress bar hides."""
    if console.is_terminal:
        os.write(2, b"\x1b[?25h\n")


def _detach_from_closed_terminal() -> None:
    """Discard what is printed from now on if the terminal was closed, so that printing is no error."""
    for file in (1, 2):
        try:
            os.write(file, b"")
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), file)


def _is_alone() -> bool:
    return os.environ.get("WORLD_SIZE", "1") == "1"


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    logging.getLogger("timm").setLevel(logging.ERROR)  # it warns of a head that is left out on purpose
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        flush()
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        _discard_output()
        return 0
    except (CycloptsError, SniperError, OSError, MemoryError, RuntimeError) as error:
        message = _explain(error, arguments)
        if message is None:
            raise
        print_error(message)
        return 2
    except KeyboardInterrupt as interrupt:
        stop = Stopped.of(interrupt)
        print_progress(f"stopped{stop.note}")
        return stop.exit_code
    return 0


def _explain(error: Exception, arguments: Sequence[str]) -> str | None:
    """Explain an error that a user can resolve; None for a fault of the program."""
    if isinstance(error, CycloptsError):
        return _describe(error, arguments)
    if isinstance(error, UnknownOption):
        return _explain_option(error.option, arguments)
    if isinstance(error, OSError):  # a path that cannot be written, a full disk
        if error.filename == STANDARD_OUTPUT:
            _discard_output()
        return explain_os_error(error)
    if isinstance(error, MemoryError):
        return f"there is not enough memory ({' '.join(str(error).split()) or 'no details'})"
    if isinstance(error, SniperError):
        is_of_data = isinstance(error, ImageError | AnnotationError)
        return str(error) + (_describe_place(str(error), arguments) if is_of_data else "")
    return explain_shared_memory(error)


def _describe_place(message: str, arguments: Sequence[str]) -> str:
    """Describe where a command gets the fields of `data.read` that a message advises to set."""
    if "data.read." not in message or not arguments or arguments[0] not in _names():
        return ""
    command = _find_command(arguments[0])
    if command.has("data.read."):
        return "; a field of data.read is set by --data.read.FIELD VALUE"
    if command.has("config"):
        return "; a field of data.read is set in an experiment file (--config FILE)"
    return "; a field of data.read is set in config.yaml of the run" if command.has("RUN") else ""


def _discard_output() -> None:
    """Discard what is still to be written to standard output, at the end of the process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning of the package or of a library in one line."""
    print_warnings([str(message)])


def _describe(error: CycloptsError, arguments: Sequence[str]) -> str:
    """Describe a mistake in the arguments, and what to use instead of an unknown option or command."""
    if isinstance(error, UnknownOptionError) and arguments[0] in _names():
        return _explain_option((error.token.keyword or error.token.value).partition("=")[0], arguments)
    if isinstance(error, UnknownCommandError) and arguments[0] in OTHER_COMMANDS:
        return f"{arguments[0]}: no such command; use sniper {OTHER_COMMANDS[arguments[0]]}"
    if isinstance(error, UnknownCommandError) and Path(arguments[0]).exists():
        return f"{arguments[0]}: expected a command first, such as sniper train {arguments[0]}"
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        (usage,) = [usage for command, usage in _COMMANDS.items() if command.__name__ == arguments[0]]
        return f"{error.unused_tokens[0]}: is one argument too many; usage: sniper {arguments[0]} {usage}".rstrip()
    return str(error)


def _explain_option(option: str, arguments: Sequence[str]) -> str:
    """Explain an option that the command, the first of the arguments, does not have."""
    return explain_option(option, _find_command(arguments[0]), _describe_commands())


def _find_command(name: str) -> Command:
    (command,) = [command for command in _describe_commands() if command.name == name]
    return command


def _describe_commands() -> list[Command]:
    return [
        Command(
            name=command.__name__,
            usage=usage,
            options=[
                name
                for argument in app[command.__name__].assemble_argument_collection()
                for name in argument.names
                if name.startswith("-")
            ],
        )
        for command, usage in _COMMANDS.items()
    ]


def _names() -> list[str]:
    return [command.__name__ for command in _COMMANDS]
