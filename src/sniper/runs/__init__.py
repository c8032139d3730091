"""The run folder with its checkpoints, and the processes that share a run."""
