"""Write self-contained HTML pages from templates that share one frame and one style sheet."""

import base64
import io
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sniper.chips import LevelSpec
from sniper.errors import counted, printable
from sniper.files import atomic_write

_QUALITY = 80  # of JPEG


def render(template: str, *, package: str = "sniper.reports", **values: Any) -> str:
    """Render a template that extends `page.html.j2`.

    Control characters of names become escape sequences. A page loads nothing: pictures are part of it.

    Args:
        template: name of the file.
        package: that has it.
        **values: that the template uses; a missing one is an error.
    """
    return _environment(package).get_template(template).render(**values)


@cache
def _environment(package: str) -> jinja2.Environment:
    """Return the templates of a package; each is compiled once, which takes longer than to render it."""
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(name, ".") for name in (package, "sniper.reports")]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: (
            printable(value) if type(value) is str else value
        ),  # names of files and classes
    )
    environment.filters |= {
        "resize": resize_rule,
        "sizes": sizes_text,
        "thousands": "{:,}".format,
        "counted": counted,
    }
    return environment


def write_page(html: str, path: Path) -> None:
    """Write a page; an existing file is replaced atomically.

    Raises:
        OSError: if it cannot be written; names the file.
    """
    with atomic_write(path) as file:
        file.write(html.encode())


def to_jpeg(pixels: UInt8[np.ndarray, "h w 3"], *, quality: int = _QUALITY) -> str:
    """Return pixels as base64 JPEG."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "JPEG", quality=quality)
    return base64.b64encode(file.getvalue()).decode()


def sizes_text(level: LevelSpec) -> str:
    """Return the valid range of a level as text."""
    return level.valid_range.describe()


def resize_rule(level: LevelSpec) -> str:
    """Return the resize rule of a level as text."""
    if level.factor is not None:
        return f"×{level.factor:g}"
    if level.long_side is not None:
        return f"long side {level.long_side}"
    limit = f", long at most {level.max_long_side}" if level.max_long_side else ""
    return f"short side {level.short_side}{limit}"
