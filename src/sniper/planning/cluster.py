"""What a training takes on several machines with several GPUs, from figures that were measured or given."""

import math
import re
import time
from dataclasses import dataclass
from typing import Any

from sniper.config.experiment import ExperimentSpec
from sniper.data.datasets import Dataset
from sniper.data.datasets.dataset import ImageRecord
from sniper.errors import ConfigError, ImageError, counted
from sniper.files import open_regular
from sniper.remote import is_remote

_NUM_CHIPS = 64  # that are read to measure how fast a core is
_NUM_IMAGES = 256  # whose files are measured
_SIZE = re.compile(r"(?:(\d{1,6})\s*[x×]\s*)?(\d{1,4})")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Machines with equal numbers of GPUs.

    Attributes:
        num_machines: of them.
        gpus: of each machine.
    """

    num_machines: int
    gpus: int

    @classmethod
    def parse(cls, text: str) -> "Cluster":
        """Return the cluster of a text, such as `8x8` for 8 machines with 8 GPUs each, or `4` for one machine.

        Raises:
            ConfigError: if it is none.

        Example:
            >>> Cluster.parse("2x8").num_gpus
            16
        """
        match = _SIZE.fullmatch(text.strip())
        cluster = None if match is None else cls(num_machines=int(match[1] or 1), gpus=int(match[2]))
        if cluster is None or not cluster.num_gpus:
            raise ConfigError(
                f"--gpus: expected machines x GPUs of each, such as 8x8, or a number, not {text!r}"
            )
        return cluster

    @property
    def num_gpus(self) -> int:
        """GPUs of all machines."""
        return self.num_machines * self.gpus


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How fast one core reads chips, and how large the image files are, measured on a sample.

    Attributes:
        chips_per_second: of one core of this machine, from files in memory: decoding, cutting and resizing.
        num_chips: that were read.
        bytes_per_image: mean size of the image files.
        num_images: whose files were measured.
    """

    chips_per_second: float
    num_chips: int
    bytes_per_image: float
    num_images: int


@dataclass(frozen=True, kw_only=True)
class ClusterPlan:
    """What a training takes on a cluster.

    Attributes:
        cluster: the machines.
        chips_per_second: of one GPU, reading not counted.
        source: where that speed comes from, in words.
        batch_size: chips of a step of all GPUs.
        chips_per_epoch: positive and negative ones.
        epochs: of the experiment.
        num_images: of the data set.
        reading: None without image files.
    """

    cluster: Cluster
    chips_per_second: float
    source: str
    batch_size: int
    chips_per_epoch: int
    epochs: float
    num_images: int
    reading: Reading | None

    @property
    def hours_per_epoch(self) -> float:
        """Of computing the steps of an epoch."""
        steps = -(-self.chips_per_epoch // self.batch_size)
        return steps * self.batch_size / (self.cluster.num_gpus * self.chips_per_second) / 3600

    @property
    def hours(self) -> float:
        """Of computing all steps."""
        return self.hours_per_epoch * self.epochs

    @property
    def chips_per_machine(self) -> float:
        """Chips that each machine reads in a second."""
        return self.chips_per_second * self.cluster.gpus

    @property
    def cores_per_machine(self) -> int | None:
        """Cores of each machine that read without making the GPUs wait."""
        return (
            None
            if self.reading is None
            else math.ceil(self.chips_per_machine / self.reading.chips_per_second)
        )

    @property
    def image_bytes(self) -> float | None:
        """Of all image files: what the cache of each machine takes to keep them, as epochs are in random order."""
        return None if self.reading is None else self.reading.bytes_per_image * self.num_images

    @property
    def bytes_per_second(self) -> float | None:
        """That each machine reads of remote images in the first epoch; every image is read by one machine."""
        if self.image_bytes is None:
            return None
        return self.image_bytes / self.cluster.num_machines / (self.hours_per_epoch * 3600)

    def describe(self) -> list[str]:
        """Return the plan as sentences, and which figures are assumed."""
        cluster, reading = self.cluster, self.reading
        lines = [
            f"{counted(cluster.num_machines, 'machine')} of {counted(cluster.gpus, 'GPU')}: {_duration(self.hours)} "
            f"for {counted(self.epochs, 'epoch')}, {_duration(self.hours_per_epoch)} each, at "
            f"{self.chips_per_second:.3g} chips a second and GPU ({self.source}) and "
            f"{counted(self.batch_size, 'chip')} a step"
        ]
        if reading is None:
            lines.append("cores and cache are not known without the image files (--images)")
        else:
            cores, total, rate = (
                self.cores_per_machine or 0,
                self.image_bytes or 0,
                self.bytes_per_second or 0,
            )
            lines += [
                f"reading: {self.chips_per_machine:,.4g} chips a second for each machine, which takes "
                f"{counted(cores, 'core')} at {reading.chips_per_second:.3g} chips a second and core (measured here on "
                f"{counted(reading.num_chips, 'chip')}); --data.num_workers {math.ceil(cores / cluster.gpus)} for each "
                "GPU",
                f"images: {total / 1e9:.3g} GB in {self.num_images:,} files of {reading.bytes_per_image / 1e3:.3g} kB "
                f"(measured on {counted(reading.num_images, 'file')}); if they are remote, that is the cache of each "
                f"machine that keeps them all, and each machine reads {rate / 1e6:.3g} MB a second in the first epoch",
            ]
        lines.append(
            "assumed, not measured: exchanging gradients takes no time, all GPUs and cores are as fast as these; "
            "mining, scores and checkpoints are not counted"
        )
        return lines

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        reading = self.reading
        return {
            "machines": self.cluster.num_machines,
            "gpus": self.cluster.num_gpus,
            "chips_per_second_and_gpu": round(self.chips_per_second, 3),
            "source": self.source,
            "batch_size": self.batch_size,
            "hours_per_epoch": round(self.hours_per_epoch, 4),
            "hours": round(self.hours, 3),
            "cores_per_machine": self.cores_per_machine,
            "chips_per_second_and_core": None if reading is None else round(reading.chips_per_second, 1),
            "image_gigabytes": None if self.image_bytes is None else round(self.image_bytes / 1e9, 3),
            "megabytes_per_second_and_machine": (
                None if self.bytes_per_second is None else round(self.bytes_per_second / 1e6, 2)
            ),
        }


def _duration(hours: float) -> str:
    """Return a time with the unit that suits it."""
    if hours >= 1:
        return f"{hours:.3g} hours"
    return f"{hours * 60:.3g} minutes" if hours >= 1 / 60 else f"{hours * 3600:.3g} seconds"


def measure_reading(experiment: ExperimentSpec, dataset: Dataset) -> Reading | None:
    """Read some chips of an epoch as training does; None if an image file is missing or cannot be read.

    Args:
        experiment: the experiment.
        dataset: its training set.

    Raises:
        AnnotationError: if the data set has no box to learn from.
    """
    from sniper.data.batches import ChipDataset
    from sniper.training.epochs import order_epoch

    order = order_epoch(experiment, dataset, epoch=0)
    chips = ChipDataset(order, spec=experiment.data, kept_images=order.num_streams)
    count = min(_NUM_CHIPS, len(chips))
    sample = range(0, len(dataset), max(len(dataset) // _NUM_IMAGES, 1))[:_NUM_IMAGES]
    try:
        sizes = [_num_bytes(dataset[index]) for index in sample]
        # The images of these chips come from the disk or a server, which is not a matter of cores.
        for index in order.table.image_indices[order.chip_indices[:count]].tolist():
            _num_bytes(dataset[index])
        started = time.process_time()
        for index in range(count):
            chips[index]
    except (ImageError, OSError):
        return None
    seconds = time.process_time() - started
    return Reading(
        chips_per_second=count / max(seconds, 1e-9),
        num_chips=count,
        bytes_per_image=sum(sizes) / len(sizes),
        num_images=len(sizes),
    )


def _num_bytes(record: ImageRecord) -> int:
    """Return the size of an image file, and have it in memory or in the cache."""
    file = record.path.open_binary(is_fixed=True) if is_remote(record.path) else open_regular(record.path)
    with file:
        return len(file.read())
