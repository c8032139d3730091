"""Data sets on disk, read and checked: COCO JSON."""
