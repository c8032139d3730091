"""Score detections against ground truth.

`coco` computes the twelve COCO numbers, `diagnosis` scores by class and by size and counts false positives,
`comparison` bounds the difference between two detectors. All of them match with `matching`.
"""
