"""Score detections against ground truth.

`results` reads detections, `pair` joins them with their ground truth, `coco` computes the twelve COCO numbers,
`diagnosis` scores by class and by size and counts false positives, `operating_point` finds the score threshold with the
best F1, `comparison` bounds the difference between two detectors, `exchanged` recognises ids of other classes. All of
them match with `matching`.
"""
