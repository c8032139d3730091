"""The weights of a detector of transformers, from a folder or from the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sniper.errors import WeightsError, count_and_list
from sniper.models.spec import DetectorSpec
from sniper.models.transformers_detectors.adapter import TransformersModel
from sniper.models.transformers_detectors.config import build_config, read_config, resolve
from sniper.models.transformers_detectors.hub import check_available, find_weights, import_transformers, quiet
from sniper.models.weights import LibraryWeights

_NO_CLASS = "N/A"  # name of rows that stand for no class, in DETR trained on COCO


def load_library_weights(spec: DetectorSpec) -> LibraryWeights:
    """Load the weights of the detector that `model.name` names.

    Raises:
        ConfigError: if transformers is not installed, or does not have such a detector.
        WeightsError: if they cannot be downloaded, read, or belong to another detector.
    """
    transformers, name = import_transformers(), str(spec.name)
    check_available(spec)
    spec = resolve(spec)
    named = read_config(spec)
    names = [str(named.id2label[index]) for index in range(named.num_labels)]
    config = build_config(spec, num_classes=len(names))
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            net, report = transformers.AutoModelForObjectDetection.from_pretrained(
                name,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                trust_remote_code=False,
            )
    except Exception as error:  # the hub, the network and the files raise unrelated exceptions
        raise WeightsError(
            f"model.name: {name}: its weights cannot be loaded ({' '.join(str(error).split())})"
        ) from error
    source = find_weights(name) or Path(name)
    model = TransformersModel(spec, net, num_classes=len(names))
    return _convert(model, report, names=names, source=source)


def _convert(model: TransformersModel, report: Any, *, names: Sequence[str], source: Path) -> LibraryWeights:
    """Leave out tensors that the files lack, and rows that stand for no class."""
    tensors = dict(model.state_dict())
    lacking = [name for name in tensors if name.removeprefix("net.") in set(report["missing_keys"])]
    if 2 * len(lacking) > len(tensors):
        raise WeightsError(
            f"{source}: has other tensors than {model.net.config.model_type}: {count_and_list(lacking)} are missing"
        )
    labels = [label for label, name in enumerate(names) if name != _NO_CLASS]
    for name, layout in model.class_layouts.items():
        tensors[name] = tensors[name][layout.rows(labels, num_classes=len(names))]
    for name in lacking:
        del tensors[name]
    # The names of tensors that are not used are reported; their values are not read.
    tensors |= {f"net.{name}": torch.empty(0) for name in sorted(report["unexpected_keys"])}
    return LibraryWeights(
        source=source,
        tensors=tensors,
        class_names=tuple(names[label] for label in labels),
        category_ids=tuple(labels),
        lacking=tuple(lacking),
    )
