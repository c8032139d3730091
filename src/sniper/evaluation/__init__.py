"""Score detections against ground truth.

`coco` computes the twelve COCO numbers, `diagnosis` finds where errors come from, `comparison` bounds the difference
between two detectors.
"""
