"""The configuration of a detector of transformers: read by name at the start of a run, and then part of its spec."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sniper.errors import ConfigError, WeightsError
from sniper.models.spec import DetectorSpec
from sniper.models.transformers_detectors.families import find_family
from sniper.models.transformers_detectors.hub import check_available, import_transformers, quiet
from sniper.specs import parse_json

_OF_CLASSES = ("id2label", "label2id", "num_labels")
_OF_FILES = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
_FIXED_SIZES = (
    "anchor_image_size",
    "eval_size",
)  # of images, for which anchors and encodings are precomputed
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_MAX_VALUE = 255.0
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_NO_MEAN, _NO_STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def resolve(spec: DetectorSpec, *, earlier: DetectorSpec | None = None) -> DetectorSpec:
    """Return a detector with the architecture and the normalization that its name stands for, where these are unset.

    Args:
        spec: the configuration.
        earlier: of the same name, from which unset values are taken; None reads them.

    Raises:
        ConfigError: if transformers is not installed, or has no such detector.
        WeightsError: if a file must be downloaded and cannot be.
    """
    options = spec.transformers
    if spec.kind != "transformers":
        return spec
    if earlier is not None and (earlier.kind, earlier.name) == (spec.kind, spec.name):
        known = earlier.transformers
        options = replace(
            options,
            config=options.config or known.config,
            image_mean=options.image_mean or known.image_mean,
            image_std=options.image_std or known.image_std,
        )
    if options.config is None:
        config = read_config(spec)
        options = replace(options, config=_to_text(config))
    if None in (options.image_mean, options.image_std):
        mean, std = _read_normalization(spec, model_type=find_model_type(options.config))
        options = replace(options, image_mean=options.image_mean or mean, image_std=options.image_std or std)
    return replace(spec, transformers=options)


def read_config(spec: DetectorSpec) -> Any:
    """Read the configuration of a detector by its name, as an object of transformers.

    Raises:
        ConfigError: if there is no such detector, or it is not supported.
        WeightsError: if it must be downloaded and cannot be.
    """
    transformers = import_transformers()
    check_available(spec)
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(str(spec.name), trust_remote_code=False)
    except Exception as error:  # the hub, the network and the file raise unrelated exceptions
        raise ConfigError(
            f"model.name: {spec.name}: has no configuration that transformers can read ({_one_line(error)})"
        ) from error
    find_family(config.model_type, name=spec.name)
    return config


def build_config(spec: DetectorSpec, *, num_classes: int) -> Any:
    """Return the configuration of a resolved detector as an object of transformers.

    It names no weights to download, and no size that images must have.

    Raises:
        ConfigError: if transformers does not take it.
    """
    transformers = import_transformers()
    values = _parse(spec.transformers.config)
    model_type = values.pop("model_type", None)
    find_family(model_type, name=spec.name)
    values |= {name: None for name in _FIXED_SIZES if name in values}
    try:
        with quiet():
            config = transformers.AutoConfig.for_model(model_type, **values, num_labels=num_classes)
    except Exception as error:  # its checks raise unrelated exceptions
        raise ConfigError(
            f"model.transformers.config: transformers {transformers.__version__} cannot use it ({_one_line(error)})"
        ) from error
    if model_type == "yolos" and config.auxiliary_loss:
        raise ConfigError("model.transformers.config: auxiliary_loss must be false for yolos")
    backbone: Any = getattr(config, "backbone_config", None)
    if getattr(backbone, "use_pretrained_backbone", False):
        backbone.use_pretrained_backbone = False
    return config


def find_model_type(config: str | None) -> str | None:
    """Return the type of the model of a configuration as JSON.

    Raises:
        ConfigError: if it is not JSON.
    """
    model_type: str | None = _parse(config).get("model_type")
    return model_type


def _parse(config: str | None) -> dict[str, Any]:
    try:
        values: dict[str, Any] = parse_json(config or "{}", dict)
    except ValueError as error:
        raise ConfigError(f"model.transformers.config: expected a JSON object ({error})") from error
    return values


def _to_text(config: Any) -> str:
    """Return all values of a configuration that its architecture depends on, also those that are defaults today.

    It is text, since YAML has one kind of number where transformers has two.
    """
    values = json.loads(config.to_json_string(use_diff=False))
    return json.dumps(_without(values, (*_OF_CLASSES, *_OF_FILES)))


def _without(values: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {
        name: _without(value, names) if isinstance(value, dict) else value
        for name, value in values.items()
        if name not in names
    }


def _read_normalization(
    spec: DetectorSpec, *, model_type: str | None
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return mean and standard deviation of values from 0 to 1, as the image processor of a detector has them.

    A folder without an image processor has the usual one of its architecture.
    """
    transformers, name = import_transformers(), str(spec.name)
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in _PROCESSOR_FILES):
        if find_family(model_type, name=name).is_normalized:
            return _IMAGENET_MEAN, _IMAGENET_STD
        return _NO_MEAN, _NO_STD
    try:
        with quiet():
            processor = transformers.AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the hub, the network and the file raise unrelated exceptions
        raise WeightsError(
            f"model.name: {name}: its image processor cannot be read ({_one_line(error)}); set "
            "model.transformers.image_mean and model.transformers.image_std"
        ) from error
    scale = _MAX_VALUE * processor.rescale_factor if processor.do_rescale else _MAX_VALUE
    mean, std = _NO_MEAN, _NO_STD
    if processor.do_normalize:
        mean, std = processor.image_mean, processor.image_std
    red, green, blue = (float(value) / scale for value in mean)
    stds = tuple(float(value) / scale for value in std)
    return (red, green, blue), (stds[0], stds[1], stds[2])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
