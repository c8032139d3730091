"""Score detections against ground truth.

`results` reads detections, `pair` joins them with their ground truth, `coco` computes the twelve COCO numbers,
`false_positives` counts false positives per image at a recall, `diagnosis` scores by size, `proposals` scores boxes
whatever their classes, `operating_point` finds the score threshold with the best F1, `comparison` bounds the difference
between two detectors, `exchanged` recognises ids of other classes. All of them match with `matching`.
"""
