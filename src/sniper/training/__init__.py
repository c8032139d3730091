"""Training: epochs of chips to weights.

`loop` runs the epochs, `learner` makes one update, `optimizer` has the learning-rate schedule, `epochs` chooses the
chips of an epoch. `callbacks` reports, `trackers` records the metrics elsewhere, `signals` handles Ctrl-C, SIGTERM and
SIGHUP.
"""
