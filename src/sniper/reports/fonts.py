"""Fonts for the text of pictures: names of classes in the scripts of the world."""

import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import ImageFont

from sniper.data.datasets import Category
from sniper.errors import count_and_list, counted, printable

_MAX_LENGTH = 60  # characters of a name


def picture_names(categories: Sequence[Category]) -> list[str]:
    """Return the text by which each category is named in pictures, by label.

    It is the name, with escape sequences for control characters. A name that no font has all characters of is drawn as
    `class ID`, with a warning: boxes in place of characters would look the same for all classes.
    """
    names = [_shorten(" ".join(printable(category.name).split())) for category in categories]
    missing = [label for label, name in enumerate(names) if _find_font(frozenset(name)) is None]
    if missing:
        examples = count_and_list([repr(categories[label].name) for label in missing], separator=", ")
        warnings.warn(
            f"no font on this machine has the characters of {counted(len(missing), 'class name')} ({examples}), whose "
            "ids are drawn instead; install a font of that script, such as one of the Noto fonts",
            stacklevel=3,
        )
    for label in missing:
        names[label] = f"class {printable(str(categories[label].category_id))}"
    return names


def _shorten(name: str) -> str:
    return name if len(name) <= _MAX_LENGTH else f"{name[: _MAX_LENGTH - 1]}…"


def load_font(height: int, text: str = "") -> ImageFont.FreeTypeFont:
    """Load a font that has the characters of a text: DejaVu Sans, or else one of the system.

    Args:
        height: of the letters, pixels.
        text: to be drawn.
    """
    return ImageFont.truetype(font_file(text), height)


def font_file(text: str) -> Path:
    """Return the file of a font that has the characters of a text: DejaVu Sans, or else one of the system."""
    return _find_font(frozenset(text)) or _default_font()


@cache
def _find_font(characters: frozenset[str]) -> Path | None:
    """Return the first font that has all of these characters; None if there is none."""
    codes = {ord(character) for character in characters if not character.isspace()}
    return next((path for path in _fonts() if codes <= _codes_of(path)), None)


@cache
def _fonts() -> tuple[Path, ...]:
    """Return upright fonts of normal weight, those without serifs first, after the one that comes with matplotlib."""
    import matplotlib
    from matplotlib.font_manager import fontManager

    own = matplotlib.get_data_path()  # with a font that draws the name of a script in place of each character
    entries = [
        entry
        for entry in fontManager.ttflist
        if entry.style == "normal"
        and entry.weight in (400, "normal", "regular")
        and not entry.fname.startswith(own)
    ]
    entries.sort(key=lambda entry: ("sans" not in entry.name.lower(), entry.name, entry.fname))
    return (_default_font(), *dict.fromkeys(Path(entry.fname) for entry in entries))


def _default_font() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@cache
def _codes_of(path: Path) -> frozenset[int]:
    """Return the characters of a font; none if it cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(str(path)).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
