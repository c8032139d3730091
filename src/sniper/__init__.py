"""SNIPER: efficient multi-scale training of object detectors on chips cut around the objects."""
