"""Runs: the folder of a run, its checkpoints, and the processes that work on it."""
