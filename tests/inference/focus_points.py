"""Made-up results of a focus."""

from typing import Literal

from sniper.config.experiment import FocusSpec
from sniper.inference.focus_curve import FocusPoint


def point(share: float, ap: float, cues: Literal["detections", "head"] = "detections") -> FocusPoint:
    """Return what a setting finds in a share of the time; all of it is a whole search."""
    return FocusPoint(
        focus=None if share == 1 else FocusSpec(min_score=share, window=256, cues=cues),
        megapixels=share,
        pixel_share=share / 2,
        seconds=share,
        time_share=share,
        ap=ap,
        ap50=ap,
        ap_small=ap,
    )
