"""Collect the errors of libtiff, which it would print on standard error.

Pillow and GDAL each have their libtiff, which calls an error handler in the thread that decodes. Ours keeps the
messages of threads that collect, and passes those of all others on to the handler before it. Standard error itself is
not redirected: that would take the messages of other threads.
"""

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

_MAX_MESSAGE = 500  # bytes
_MAX_MESSAGES = 20

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)
_collected = threading.local()


@contextmanager
def collect_errors() -> Iterator[list[str]]:
    """Collect the errors of libtiff in this thread; where its library cannot be located, they are printed."""
    _install_all("rasterio" in sys.modules)
    outer = getattr(_collected, "messages", None)
    messages: list[str] = []
    _collected.messages = messages
    try:
        yield messages
    finally:
        _collected.messages = outer


@cache
def _install_all(has_gdal: bool) -> None:
    """Install the error handler in every libtiff that is loaded; GDAL's is loaded later than Pillow's."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return
    for path in {line.split(maxsplit=5)[5] for line in lines if "/libtiff" in line}:
        _install(path)


@cache
def _install(path: str) -> tuple[Any, ...]:
    """Install the error handler in a library once; return what must stay alive."""
    library, c = ctypes.CDLL(path), ctypes.CDLL(None)
    c.vsnprintf.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_void_p]
    library.TIFFSetErrorHandler.argtypes = [ctypes.c_void_p]
    library.TIFFSetErrorHandler.restype = ctypes.c_void_p
    previous: list[Any] = []

    def handle(module: bytes | None, template: bytes, arguments: int) -> None:
        messages = getattr(_collected, "messages", None)
        if messages is None:
            for handler in previous:
                handler(module, template, arguments)
        elif len(messages) < _MAX_MESSAGES:
            text = ctypes.create_string_buffer(_MAX_MESSAGE)
            c.vsnprintf(text, _MAX_MESSAGE, template, arguments)
            messages.append(text.value.decode(errors="replace"))

    handler = _Handler(handle)
    address = library.TIFFSetErrorHandler(ctypes.cast(handler, ctypes.c_void_p))
    if address:
        previous.append(_Handler(address))
    return library, handler
