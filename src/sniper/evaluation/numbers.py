"""The twelve numbers of COCO, of boxes or of masks."""

from dataclasses import dataclass

NUMBERS = (
    "ap",
    "ap50",
    "ap75",
    "ap_small",
    "ap_medium",
    "ap_large",
    "ar_1",
    "ar_10",
    "ar",
    "ar_small",
    "ar_medium",
    "ar_large",
)
"""The names of COCO's twelve numbers, in their order."""


@dataclass(frozen=True, kw_only=True)
class CocoNumbers:
    """COCO's twelve numbers, fractions from 0 to 1, or -1 where the ground truth has no such object.

    AP is the mean over classes, and over IoU 0.50, 0.55 … 0.95 unless the name gives an IoU. Small objects have an area
    of at most 32² image pixels, large ones of at least 96². `ar_1` and `ar_10` use the best 1 and 10 detections of each
    image and class, all other numbers the best `max_detections`.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar_1: float
    ar_10: float
    ar: float
    ar_small: float
    ar_medium: float
    ar_large: float
    max_detections: int = 100

    @property
    def numbers(self) -> dict[str, float]:
        """The twelve numbers by name; `ar` is named after `max_detections`, such as `ar_100`."""
        return {self._name_of(name): getattr(self, name) for name in NUMBERS}

    def _name_of(self, name: str) -> str:
        return f"ar_{self.max_detections}" if name == "ar" else name
