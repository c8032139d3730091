"""The demo: a made-up data set, and a run from training to pictures on it."""
