"""The two-stage detector: losses from chips, detections from images. Independent of data sets.

`spec` defines the configuration, `backbone` computes features, `rpn` and `roi_head` are the two stages, `targets`
matches anchors and proposals to ground truth, `two_stage` combines them, `build` makes a detector for training or for
inference, `weights` reads and writes tensors.
"""
