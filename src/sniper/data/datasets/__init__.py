"""Data sets: annotation files, read and checked once.

`load_dataset` is the one entry. `dataset` has the types that it returns, `coco` reads COCO JSON.
"""

from sniper.data.datasets.coco import load_dataset
from sniper.data.datasets.dataset import Category, Dataset, DatasetIdentity, ImageRecord

__all__ = ["Category", "Dataset", "DatasetIdentity", "ImageRecord", "load_dataset"]
