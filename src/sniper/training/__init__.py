"""Training: epochs of chips to weights.

`loop` runs the epochs, `learner` makes one update, `optimizer` has the learning-rate schedule, `epochs` chooses the
chips of an epoch. `callbacks` reports, `signals` handles Ctrl-C, SIGTERM and SIGHUP, `tensorboard` writes event files.
"""
