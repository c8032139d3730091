"""Deltas of boxes: compared with torchvision, and decoded again."""

import torch
from torchvision.models.detection._utils import BoxCoder as TorchvisionCoder

from sniper.models.box_coder import BoxCoder

CODER = BoxCoder(center_weight=10.0, size_weight=5.0)
TORCHVISION_CODER = TorchvisionCoder(weights=(10.0, 10.0, 5.0, 5.0))


def random_boxes(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(50, 2, generator=generator) * 100
    return torch.cat([corners, corners + 1 + torch.rand(50, 2, generator=generator) * 60], dim=1)


def test_encoding_equals_torchvision() -> None:
    boxes, references = random_boxes(0), random_boxes(1)
    expected = TORCHVISION_CODER.encode_single(boxes, references)
    torch.testing.assert_close(CODER.encode(boxes, references), expected)


def test_decoding_equals_torchvision_for_extreme_deltas_too() -> None:
    references = random_boxes(1)
    deltas = torch.randn(50, 4, generator=torch.Generator().manual_seed(2)) * 30
    expected = TORCHVISION_CODER.decode_single(deltas, references)
    torch.testing.assert_close(CODER.decode(deltas, references), expected)


def test_decoding_inverts_encoding() -> None:
    boxes, references = random_boxes(0), random_boxes(1)
    decoded = CODER.decode(CODER.encode(boxes, references), references)
    torch.testing.assert_close(decoded, boxes, rtol=1e-5, atol=1e-4)


def test_a_batch_of_deltas_is_decoded_against_the_same_references() -> None:
    deltas = torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(0))
    references = random_boxes(0)
    batch = BoxCoder().decode(deltas, references)
    assert torch.equal(batch[1], BoxCoder().decode(deltas[1], references))
