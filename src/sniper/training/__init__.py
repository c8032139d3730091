"""Train a detector: `loop` runs the epochs, `learner` makes one update, `optimizer` has the learning-rate schedule.

`signals` handles Ctrl-C and SIGTERM; `tensorboard` writes the metrics for TensorBoard.
"""
