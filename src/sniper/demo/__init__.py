"""The demo: a synthetic data set, and a run from training to pictures on it."""
