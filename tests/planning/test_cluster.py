"""What a training takes on a cluster follows from the chips and from figures that were measured or given."""

from pathlib import Path

import pytest

from sniper.config.experiment import ExperimentSpec
from sniper.data.datasets import Dataset, load_dataset
from sniper.errors import ConfigError
from sniper.planning.cluster import Cluster, ClusterPlan, Reading, measure_reading
from sniper.planning.plan import plan
from sniper.training.epochs import order_epoch

READING = Reading(chips_per_second=250.0, num_chips=64, bytes_per_image=200_000.0, num_images=32)


def cluster_plan(reading: Reading | None = READING) -> ClusterPlan:
    return ClusterPlan(
        cluster=Cluster(num_machines=8, gpus=8),
        chips_per_second=100.0,
        source="given",
        batch_size=1024,
        chips_per_epoch=1_024_000,
        epochs=3.0,
        num_images=400_000,
        reading=reading,
    )


@pytest.mark.parametrize(
    ("text", "machines", "gpus"), [("8x8", 8, 8), ("4", 1, 4), ("2 × 16", 2, 16), ("1x1", 1, 1)]
)
def test_a_cluster_is_machines_times_gpus(text: str, machines: int, gpus: int) -> None:
    assert Cluster.parse(text) == Cluster(num_machines=machines, gpus=gpus)


@pytest.mark.parametrize("text", ["", "0", "0x8", "8x", "x8", "8x8x8", "-1", "many", "1e3"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--gpus: expected machines x GPUs of each, such as 8x8"):
        Cluster.parse(text)


def test_hours_cores_and_cache_follow_from_the_figures() -> None:
    planned = cluster_plan()
    assert planned.hours_per_epoch == pytest.approx(1_024_000 / (64 * 100) / 3600)
    assert planned.hours == pytest.approx(3 * planned.hours_per_epoch)
    assert planned.cores_per_machine == 4  # 8 GPUs read 800 chips a second, a core 250
    assert planned.image_bytes == pytest.approx(80e9)
    assert planned.bytes_per_second == pytest.approx(80e9 / 8 / 160)
    text = "\n".join(planned.describe())
    for part in (
        "8 machines of 8 GPUs: 8 minutes for 3 epochs, 2.67 minutes each, at 100 chips a second and GPU (given)",
        "takes 4 cores at 250 chips a second and core (measured here on 64 chips)",
        "80 GB in 400,000 files of 200 kB (measured on 32 files)",
        "reads 62.5 MB a second in the first epoch",
        "assumed, not measured: exchanging gradients takes no time",
    ):
        assert part in text


def test_a_last_step_that_is_not_full_takes_as_long_as_others() -> None:
    from dataclasses import replace

    full = cluster_plan()
    assert replace(full, chips_per_epoch=1_024_001).hours_per_epoch == pytest.approx(
        full.hours_per_epoch * 1001 / 1000
    )


def test_without_images_cores_and_cache_are_not_known() -> None:
    planned = cluster_plan(None)
    assert planned.cores_per_machine is planned.image_bytes is planned.bytes_per_second is None
    assert "not known without the image files" in "\n".join(planned.describe())
    assert planned.as_dict()["image_gigabytes"] is None


def test_reading_is_measured_on_the_images(dataset: Dataset, spec: ExperimentSpec) -> None:
    reading = measure_reading(spec, dataset)
    assert reading is not None
    sizes = [record.path.stat().st_size for record in dataset]
    assert reading.bytes_per_image == pytest.approx(sum(sizes) / len(sizes))
    assert reading.num_chips == min(64, len(order_epoch(spec, dataset, epoch=0).chip_indices))
    assert reading.chips_per_second > 1


def test_a_missing_image_leaves_reading_unknown(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    moved = load_dataset(dataset.path, image_root=tmp_path, has_images=False)
    assert measure_reading(spec, moved) is None


def test_a_plan_takes_the_speed_that_is_given_or_measures_it(dataset: Dataset, spec: ExperimentSpec) -> None:
    given = plan(dataset, experiment=spec, gpus="2x4", chips_per_second=50.0)
    assert given.measurement is None
    assert given.cluster is not None
    assert given.cluster.chips_per_epoch == given.cost.num_chips
    assert given.cluster.batch_size == 8 * spec.train.batch_size
    measured = plan(dataset, experiment=spec, gpus="2x4", device="cpu")
    assert measured.measurement is not None
    assert measured.cluster is not None
    expected = spec.train.batch_size / measured.measurement.seconds_per_step
    assert measured.cluster.chips_per_second == pytest.approx(expected)
    assert measured.cluster.source == "measured on cpu here"
