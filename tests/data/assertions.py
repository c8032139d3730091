"""Comparison of batches."""

import dataclasses
from typing import Any

import torch

from sniper.data.batches import Batch


def assert_equal_batches(batch: Batch, expected: Batch) -> None:
    assert torch.equal(batch.images, expected.images)
    masks, expected_masks = batch.targets.masks, expected.targets.masks
    assert (masks is None) == (expected_masks is None)
    pairs: list[tuple[Any, Any, str]] = [
        (batch.targets, expected.targets, field.name) for field in dataclasses.fields(expected.targets)
    ]
    pairs = [pair for pair in pairs if pair[2] != "masks"]
    if expected_masks is not None:
        pairs += [(masks, expected_masks, field.name) for field in dataclasses.fields(expected_masks)]
    for owner, expected_owner, name in pairs:
        values, expected_values = getattr(owner, name), getattr(expected_owner, name)
        if isinstance(values, torch.Tensor):
            assert torch.equal(values, expected_values), name
        else:
            assert values == expected_values, name
    assert (batch.names, batch.skipped) == (expected.names, expected.skipped)
