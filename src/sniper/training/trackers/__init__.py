"""Trackers: the metrics of a run in TensorBoard, MLflow and Weights & Biases.

`tracking` sends the lines of `metrics.jsonl` to a service and survives its failures; each service has a module.
"""

from importlib import import_module
from importlib.util import find_spec

from sniper.config.experiment import TrackerName
from sniper.errors import ConfigError
from sniper.training.callbacks import Callbacks
from sniper.training.trackers.tracking import Service, Tracking

_SERVICES = {"tensorboard": "TensorBoard", "mlflow": "MLflow", "wandb": "Weights & Biases"}


def check_trackers(names: tuple[TrackerName, ...]) -> None:
    """Check that the packages of trackers are installed.

    Raises:
        ConfigError: if one is not.
    """
    for name in names:
        package = find_spec(name)
        # A folder of this name, such as the one that wandb writes to, is a package without a file.
        if package is None or package.origin is None:
            raise ConfigError(
                f"train.trackers: {_SERVICES[name]} is not installed; pip install 'sniper-det[{name}]'"
            )


def build_trackers(names: tuple[TrackerName, ...], callbacks: Callbacks) -> list[Tracking]:
    """Return a tracker for each name.

    Args:
        names: of services whose packages are installed.
        callbacks: `on_notice` is called with where a run is recorded, `on_warning` if that fails.
    """
    return [
        Tracking(_build_service(name), on_notice=callbacks.on_notice, on_warning=callbacks.on_warning)
        for name in names
    ]


def _build_service(name: TrackerName) -> Service:
    try:
        module = import_module(f"sniper.training.trackers.{name}")
    except ImportError as error:
        raise ConfigError(f"train.trackers: {_SERVICES[name]} cannot be used ({error})") from error
    service: Service = module.build_service()
    return service
