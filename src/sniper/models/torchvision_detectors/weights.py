"""The weights of torchvision's detectors: by name from torch hub's cache, or from a file."""

import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torchvision

from sniper.errors import ConfigError, WeightsError, count_and_list
from sniper.files import check_regular
from sniper.models.spec import DetectorSpec
from sniper.models.torchvision_detectors.build import backbone_weights, build_net, find_kind
from sniper.models.weights import LibraryWeights

_SECONDS_TO_ANSWER = 5.0
_NO_CLASSES = ("__background__", "N/A")  # names of the rows that stand for no class


def load_library_weights(spec: DetectorSpec) -> LibraryWeights:
    """Load the weights of a detector that `model.weights` names.

    Raises:
        ConfigError: if torchvision has no such weights, and there is no such file.
        WeightsError: if they cannot be downloaded, read, or belong to another detector.
    """
    entry, file = _find(spec)
    check_available(spec)
    source = file if file is not None else _cached(entry)
    try:
        state = _read(source) if file is not None else entry.get_state_dict(progress=False, check_hash=True)
    except Exception as error:  # the network, the file and torch raise unrelated exceptions
        raise WeightsError(f"{source}: cannot be loaded into {spec.name} ({error})") from error
    return _convert(spec, state, source=source)


def check_available(spec: DetectorSpec) -> None:
    """Check that the weights that a detector starts from are on this machine, or that their server answers.

    Raises:
        ConfigError: if torchvision has no such weights, and there is no such file.
        WeightsError: if they must be downloaded and the server does not answer within a few seconds.
    """
    missing = _missing(spec)
    if missing is None:
        return
    try:
        with urllib.request.urlopen(
            urllib.request.Request(missing.url, method="HEAD"), timeout=_SECONDS_TO_ANSWER
        ):
            pass
    except urllib.error.HTTPError:  # it answers
        pass
    except OSError as error:
        raise WeightsError(
            f"torchvision's weights {missing}: must be downloaded, and {missing.url} cannot be reached "
            f"({getattr(error, 'reason', error)}); put the file into {_cached(missing).parent}, or name another "
            "(--model.weights FILE, torchvision:NAME@FILE); a training may also start from random weights "
            "(--model.backbone.pretrained false, without --model.weights)"
        ) from error


def find_download(spec: DetectorSpec) -> str | None:
    """Describe the weights that must be downloaded, with their size; None if there are none. Uses no network."""
    missing = _missing(spec)
    return None if missing is None else f"{missing}, {missing.meta['_file_size']:.0f} MB"


def _missing(spec: DetectorSpec) -> Any:
    """Return the entry of the weights that are needed and not on this machine."""
    entry = None
    if spec.weights is not None:
        entry, _ = _find(spec)
    elif spec.backbone.pretrained:
        find_kind(spec.name)
        entry = backbone_weights(spec.name)
    return None if entry is None or _cached(entry).exists() else entry


def _find(spec: DetectorSpec) -> tuple[Any, Path | None]:
    """Return torchvision's entry for the weights of a detector, or their file."""
    find_kind(spec.name)
    text = str(spec.weights)
    entries = torchvision.models.get_model_weights(str(spec.name))
    if text in entries.__members__:
        return entries[text], None
    path = Path(text)
    if not path.exists():
        names = " or ".join(entries.__members__)
        raise ConfigError(
            f"model.weights: {text}: no such file, and {spec.name} has no weights of this name; expected {names}, or a "
            "file"
        )
    check_regular(path)
    return None, path


def _cached(entry: Any) -> Path:
    """Return the file of weights in the cache of torch hub."""
    return Path(torch.hub.get_dir()) / "checkpoints" / str(entry.url).rpartition("/")[2]


def _read(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a file of safetensors, or of one that torch has written, without executing code."""
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(state, dict) and isinstance(state.get("model"), dict):  # of torchvision's reference scripts
        state = state["model"]
    if not isinstance(state, dict) or not all(isinstance(each, torch.Tensor) for each in state.values()):
        raise ValueError("it has no tensors by name")
    return state


def _convert(spec: DetectorSpec, state: Mapping[str, torch.Tensor], *, source: Path) -> LibraryWeights:
    """Give tensors the names that they have in the adapter, and rows for real classes only."""
    kind = find_kind(spec.name)
    with torch.device("meta"):
        layouts = kind(
            spec, build_net(spec.name, num_outputs=2), num_classes=2 - kind.first_label
        ).class_layouts
    first, layout = next(iter(layouts.items()))
    name = first.removeprefix("net.")
    if name not in state:
        hint = (
            ""
            if any(each.startswith("backbone.") for each in state)
            else "; weights of a backbone belong to model.backbone.weights (with fcos, retinanet or faster_rcnn)"
        )
        raise WeightsError(f"{source}: is not of {spec.name}: {name} is missing{hint}")
    num_outputs = len(state[name]) // (layout.num_groups * layout.rows_per_class)
    with torch.device("meta"):
        net = build_net(spec.name, num_outputs=num_outputs)
    try:
        # It also brings the names of earlier versions up to date, and adds counters of batch norm.
        problems = net.load_state_dict(dict(state), strict=False, assign=True)
    except RuntimeError as error:
        raise WeightsError(f"{source}: does not fit {spec.name} ({' '.join(str(error).split())})") from error
    missing = [name for name in problems.missing_keys if not name.endswith("num_batches_tracked")]
    wrong = [f"{name} is missing" for name in missing]
    wrong += [f"{name} is not part of the model" for name in problems.unexpected_keys]
    if wrong:
        raise WeightsError(f"{source}: does not fit {spec.name}: {count_and_list(wrong)}")
    tensors = {f"net.{name}": tensor for name, tensor in net.state_dict().items() if not tensor.is_meta}
    entries = torchvision.models.get_model_weights(str(spec.name))
    names = list(entries.DEFAULT.meta["categories"])
    if len(names) != num_outputs:
        kept = {name: tensor for name, tensor in tensors.items() if name not in layouts}
        return LibraryWeights(
            source=source, tensors=kept, class_names=(), category_ids=(), lacking=tuple(layouts)
        )
    indices = [index for index, name in enumerate(names) if name not in _NO_CLASSES]
    for name, layout in layouts.items():
        rows = layout.rows(
            [index - kind.first_label for index in indices], num_classes=num_outputs - kind.first_label
        )
        tensors[name] = tensors[name][rows]
    return LibraryWeights(
        source=source,
        tensors=tensors,
        class_names=tuple(names[index] for index in indices),
        category_ids=tuple(indices),
    )
