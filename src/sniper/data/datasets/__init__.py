"""Data sets: annotation files, read and checked once.

`load_dataset` is the one entry. `dataset` has the types that it returns, `load` detects the format, and each format has
a reader.
"""

from sniper.data.datasets.dataset import Category, Dataset, DatasetIdentity, ImageRecord
from sniper.data.datasets.load import load_dataset

__all__ = ["Category", "Dataset", "DatasetIdentity", "ImageRecord", "load_dataset"]
