"""Detectors: losses from chips, detections from images. Independent of data sets.

`protocol` is what training and search need of a detector, `spec` its configuration, `build` makes one. Of the two-stage
detector, `backbone` computes features, `rpn` and `roi_head` are the two stages, `matching` matches anchors and
proposals to ground truth, and `two_stage` combines them. `weights` reads and writes tensors.
"""
