"""Colours that people with colour vision deficiency can distinguish (Okabe and Ito, 2008)."""

ORANGE, SKY_BLUE, GREEN, YELLOW, BLUE, VERMILION, PURPLE = PALETTE = (
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
GREY = "#BBBBBB"


def _lightened(color: str) -> str:
    """Return a colour half way to white."""
    return "#" + "".join(f"{(int(color[start : start + 2], 16) + 255) // 2:02X}" for start in (1, 3, 5))


CLASS_COLORS = (*PALETTE, *(_lightened(color) for color in PALETTE))
"""Colours of classes by label, used again from the fifteenth on."""


def text_color(ground: str) -> str:
    """Return black or white, whichever can be read better on a ground such as `#E69F00`."""
    red, green, blue = (int(ground[start : start + 2], 16) for start in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 110 else "white"
