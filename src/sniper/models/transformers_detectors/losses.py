"""SNIPER's labels for detectors that match queries: what is on a box that is not learned is no background.

The losses are those of transformers, which match queries to the objects of a chip. Of the queries that match none, some
are ignored: those that would match another box of the chip, and those whose predicted box is on one. Their scores are
replaced by constants that are certainly no object, so neither loss nor gradient comes from them. The matching of the
others stays as it is, since such scores make a match only worse.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torchvision.ops import box_convert

from sniper.models.chip_boxes import ChipBoxes
from sniper.models.transformers_detectors.families import Family

BOXES = "chip_boxes"
"""Key of the boxes of a chip in its labels, beside those that transformers reads."""

CHIPS = "chips"
"""Key of the class losses of the chips among the losses."""

_NO_SCORE = -50.0  # a logit whose sigmoid and its logarithm are finite, and whose loss is 0
_CLASS_LOSSES = ("loss_ce", "loss_vfl")


def to_labels(boxes: ChipBoxes) -> dict[str, Any]:
    """Return the boxes of a chip as transformers takes them.

    Args:
        boxes: of the chip, relative to its sides.
    """
    return {
        "class_labels": boxes.labels,
        "boxes": box_convert(boxes.objects, "xyxy", "cxcywh"),
        BOXES: boxes,
    }


class ChipLoss:
    """The loss of a detector of transformers, for its attribute `loss_function`.

    Args:
        library_loss: the loss of transformers.
        family: of the detector.
    """

    def __init__(self, library_loss: Callable[..., Any], family: Family) -> None:
        self._library_loss = library_loss
        self._family = family

    def __call__(
        self,
        logits: Float[torch.Tensor, "b n c"],
        labels: Sequence[Mapping[str, Any]],
        device: torch.device,
        pred_boxes: Float[torch.Tensor, "b n 4"],
        config: Any,
        outputs_class: torch.Tensor | None = None,
        outputs_coord: torch.Tensor | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], None]:
        """Compute the losses of a batch of chips.

        Args:
            logits: of the last layer; the queries made of noisy objects first, if there are such.
            labels: of each chip, see `to_labels`.
            device: of the tensors.
            pred_boxes: cxcywh, relative to the sides of the chip.
            config: of the detector.
            outputs_class: logits of all layers.
            outputs_coord: boxes of all layers.
            options: other outputs, by family.

        Returns:
            The loss; its parts `head_class` and `head_box`, and under `CHIPS` (b,) the class losses of the chips in the
            last layer; and None for outputs that nothing reads.
        """
        tensors = {"logits": logits, "pred_boxes": pred_boxes} | options
        tensors |= {"outputs_class": outputs_class, "outputs_coord": outputs_coord}
        with torch.autocast(device.type, enabled=False):
            tensors = {name: _to_float(value) for name, value in tensors.items()}
            if not _are_finite(tensors):
                loss = tensors["logits"].sum() * torch.nan
                parts = {"head_class": loss, "head_box": loss, CHIPS: loss.detach().expand(len(labels))}
                return loss, parts, None
            if any(len(label[BOXES].others) for label in labels):
                tensors = self._without_ignored(tensors, labels, config)
            return self._compute(tensors, labels, device, config)

    def _compute(
        self,
        tensors: Mapping[str, Any],
        labels: Sequence[Mapping[str, Any]],
        device: torch.device,
        config: Any,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], None]:
        loss, parts, _ = self._library_loss(labels=labels, device=device, config=config, **tensors)
        class_loss = _class_loss(parts)
        of_chips = self._class_losses(tensors, labels, device, config)
        return loss, {"head_class": class_loss, "head_box": loss - class_loss, CHIPS: of_chips}, None

    @torch.no_grad()
    def _class_losses(
        self,
        tensors: Mapping[str, Any],
        labels: Sequence[Mapping[str, Any]],
        device: torch.device,
        config: Any,
    ) -> Float[torch.Tensor, " b"]:
        """Compute what each chip adds to the class loss of the last layer, times the number of chips."""
        last_only = copy.copy(config)
        last_only.auxiliary_loss = False
        first = _num_noisy(tensors)
        losses = []
        for index, label in enumerate(labels):
            logits, boxes = (tensors[name][index : index + 1, first:] for name in ("logits", "pred_boxes"))
            _, parts, _ = self._library_loss(
                logits=logits, labels=[label], device=device, pred_boxes=boxes, config=last_only
            )
            losses.append(_class_loss(parts))
        of_chips = torch.stack(losses)
        if self._family.is_softmax:  # a mean over queries; the others are divided by the number of objects
            return of_chips
        counts = torch.tensor([len(label["boxes"]) for label in labels], device=device)
        return of_chips * counts.clamp(min=1) / counts.sum().clamp(min=1) * len(labels)

    def _without_ignored(
        self, tensors: Mapping[str, Any], labels: Sequence[Mapping[str, Any]], config: Any
    ) -> dict[str, Any]:
        """Replace the logits of ignored queries in all layers."""
        matcher, first = self._family.build_matcher(config), _num_noisy(tensors)

        def mask(
            logits: Float[torch.Tensor, "b n c"], boxes: Float[torch.Tensor, "b n 4"], *, first: int = 0
        ) -> Float[torch.Tensor, "b n c"]:
            is_ignored = torch.zeros(logits.shape[:2], dtype=torch.bool, device=logits.device)
            is_ignored[:, first:] = _find_ignored(
                matcher, logits.detach()[:, first:], boxes.detach()[:, first:].clamp(0, 1), labels
            )
            return torch.where(is_ignored[..., None], self._no_object(logits), logits)

        masked = dict(tensors)
        masked["logits"] = mask(tensors["logits"], tensors["pred_boxes"], first=first)
        if not config.auxiliary_loss:
            return masked
        axis = self._family.layer_axis
        layers, coordinates = (tensors[name].unbind(axis) for name in ("outputs_class", "outputs_coord"))
        inner = [
            mask(logits, boxes, first=first)
            for logits, boxes in zip(layers[:-1], coordinates[:-1], strict=True)
        ]
        masked["outputs_class"] = torch.stack([*inner, masked["logits"]], dim=axis)
        if tensors.get("enc_topk_logits") is not None:
            masked["enc_topk_logits"] = mask(tensors["enc_topk_logits"], tensors["enc_topk_bboxes"])
        return masked

    def _no_object(self, logits: torch.Tensor) -> Float[torch.Tensor, " c"]:
        """Return logits that are certainly no object."""
        certain = logits.new_full(logits.shape[-1:], _NO_SCORE)
        if self._family.is_softmax:
            certain[-1] = 0.0
        return certain


@torch.no_grad()
def _find_ignored(
    matcher: Callable[[Any, Any], Any],
    logits: Float[torch.Tensor, "b q c"],
    pred_boxes: Float[torch.Tensor, "b q 4"],
    labels: Sequence[Mapping[str, Any]],
) -> Bool[torch.Tensor, "b q"]:
    """Find the queries of a layer that are neither matched to an object nor background."""
    is_ignored = torch.zeros(logits.shape[:2], dtype=torch.bool, device=logits.device)
    matches = matcher({"logits": logits, "pred_boxes": pred_boxes}, labels)
    for index, (label, (matched, _)) in enumerate(zip(labels, matches, strict=True)):
        boxes: ChipBoxes = label[BOXES]
        is_free = torch.ones_like(is_ignored[index])
        is_free[matched.to(is_free.device)] = False
        (free,) = is_free.nonzero(as_tuple=True)
        if not len(boxes.others) or not len(free):
            continue
        outputs = {"logits": logits[index, free][None], "pred_boxes": pred_boxes[index, free][None]}
        others = {
            "class_labels": boxes.other_labels,
            "boxes": box_convert(boxes.others, "xyxy", "cxcywh"),
        }
        ((rows, _),) = matcher(outputs, [others])
        predicted = box_convert(pred_boxes[index], "cxcywh", "xyxy")
        is_ignored[index] = is_free & (boxes.is_on_other(predicted) | boxes.is_in_ignored(predicted))
        is_ignored[index, free[rows.to(free.device)]] = True
    return is_ignored


def _num_noisy(tensors: Mapping[str, Any]) -> int:
    """Return the number of queries made of noisy objects, which come first."""
    meta = tensors.get("denoising_meta_values")
    return 0 if meta is None else int(meta["dn_num_split"][0])


def _class_loss(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Add up the class losses of all layers, which transformers weights by 1 or has weighted."""
    values = [value for name, value in parts.items() if name.startswith(_CLASS_LOSSES)]
    return torch.stack(values).sum()


def _to_float(value: Any) -> Any:
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.float() if is_float else value


def _are_finite(tensors: Mapping[str, Any]) -> bool:
    """Check the outputs, of which transformers refuses some that are not finite. This forces a sync."""
    checks = [value.isfinite().all() for value in tensors.values() if isinstance(value, torch.Tensor)]
    return bool(torch.stack(checks).all())
