"""Introduces data to models: training, inference, and the folder in which a run lives.

`spec` holds the numbers of an experiment, `schedule` the learning rate, `run` the folder, `train` and `predict` do the
work.
"""
