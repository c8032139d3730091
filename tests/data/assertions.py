"""Comparison of batches."""

import dataclasses

import torch

from sniper.data.batches import Batch


def assert_equal_batches(batch: Batch, expected: Batch) -> None:
    assert torch.equal(batch.images, expected.images)
    for name in (field.name for field in dataclasses.fields(expected.targets)):
        values, expected_values = getattr(batch.targets, name), getattr(expected.targets, name)
        if isinstance(values, torch.Tensor):
            assert torch.equal(values, expected_values), name
        else:
            assert values == expected_values, name
    assert (batch.names, batch.skipped) == (expected.names, expected.skipped)
