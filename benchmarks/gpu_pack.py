"""Pack what a machine with a GPU and no network needs: data, weights and wheels; see docs/gpu.md.

    python benchmarks/gpu_pack.py PACK --data hit_uav=TRAIN.json,TEST.json --weights mobilenetv2_100.safetensors

Images are stored as JPEG, re-encoded only where that makes them smaller. Where the pack would still be too large, each
data set keeps the same fraction of its images, a random subset. `manifest.json` records both. Wheels are those of the
project's dependencies, and of what the GPU tests and benchmarks import, without `gpu_provided.txt`. Every import is
checked: one that is neither standard, provided, packed nor optional is an error.

Run it in the environment of development (script/setup), with access to a package index.
"""

import argparse
import ast
import functools
import io
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from gpu import find_tests
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

ROOT = Path(__file__).absolute().parents[1]
BENCHMARKS = ROOT / "benchmarks"
PYTHON = "3.12"
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
)
MARKERS = {
    "python_version": PYTHON,
    "python_full_version": f"{PYTHON}.3",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
    "os_name": "posix",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "extra": "",
}
SCRIPTS = ("gpu", "gpu_report", "train", "loader", "inference", "proof")
"""The benchmarks that run on a GPU, and the report."""


def main() -> None:
    options = parse_options()
    if options.out.exists() and any(options.out.iterdir()):
        raise SystemExit(f"{options.out}: is not empty; name a new folder")
    options.out.mkdir(parents=True, exist_ok=True)
    provided = read_provided(options.provided)
    imports = find_imports(entry_files())
    wheels = download_wheels(roots_of(imports, provided), provided, options.out / "wheels")
    optional = check_imports(imports, provided, wheels)
    (options.out / "weights").mkdir()
    for path in options.weights:
        shutil.copy(path, options.out / "weights" / path.name)
    left = options.megabytes * 1e6 - size_of(options.out) - 20_000  # the manifest
    data = pack_data(options.data, options.out / "data", max_bytes=left, quality=options.quality)
    manifest = {
        "data": data,
        "weights": [path.name for path in options.weights],
        "wheels": sorted(wheel.name for wheel in wheels),
        "optional_imports_not_packed": optional,
    }
    (options.out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    total = size_of(options.out)
    for name in ("wheels", "weights", "data"):
        print(f"{name}: {size_of(options.out / name) / 1e6:.1f} MB")
    print(json.dumps({"megabytes": round(total / 1e6, 2), **manifest}))
    if total > options.megabytes * 1e6:
        raise SystemExit(f"{options.out}: has {total / 1e6:.1f} MB, more than {options.megabytes:g}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pack data, weights and wheels for a machine with a GPU.")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument(
        "--data",
        nargs="+",
        action="extend",
        type=SourceData.parse,
        default=[],
        metavar="NAME=TRAIN.json,TEST.json",
        help="COCO JSON beside a folder `images`, the most important first",
    )
    parser.add_argument("--weights", nargs="+", action="extend", type=Path, default=[], help="safetensors")
    parser.add_argument("--provided", type=Path, default=BENCHMARKS / "gpu_provided.txt")
    parser.add_argument("--megabytes", type=float, default=60.0, help="largest size of the pack")
    parser.add_argument("--quality", type=int, default=80, help="of re-encoded JPEG")
    return parser.parse_args()


@dataclass(frozen=True, kw_only=True)
class SourceData:
    """A data set: its name, and the annotations to train and test on."""

    name: str
    splits: Mapping[str, Path]

    @classmethod
    def parse(cls, text: str) -> "SourceData":
        """Read NAME=TRAIN,TEST; argparse reports the ValueError of other text."""
        name, paths = text.split("=")
        train, test = paths.split(",")
        return cls(name=name, splits={"train": Path(train), "test": Path(test)})


def read_provided(path: Path) -> set[str]:
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return {canonicalize_name(line) for line in lines if line}


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# Imports


@dataclass(frozen=True, order=True, kw_only=True)
class Import:
    """A module that a file imports from outside the project, at once or when a function is called."""

    module: str
    file: str
    is_lazy: bool


def entry_files() -> list[Path]:
    """Return the package, the scripts, and the GPU tests with what they share."""
    scripts = [BENCHMARKS / f"{name}.py" for name in SCRIPTS]
    return [*(ROOT / "src").rglob("*.py"), *scripts, *find_tests(), *(ROOT / "tests").rglob("conftest.py")]


def find_imports(files: Iterable[Path]) -> list[Import]:
    """Return what the files import from outside the project, and the files of the project that they import."""
    waiting, seen, imports = list(files), set(), set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for name, is_lazy in imported_names(ast.parse(path.read_text())):
            module = name.partition(".")[0]
            if module == "tests":
                waiting += [file for file in files_of(name) if file.exists()]
            elif (BENCHMARKS / f"{module}.py").exists():
                waiting.append(BENCHMARKS / f"{module}.py")
            elif module not in sys.stdlib_module_names and module != "sniper":
                imports.add(Import(module=module, file=str(path.relative_to(ROOT)), is_lazy=is_lazy))
    return sorted(imports)


def files_of(name: str) -> Iterator[Path]:
    """Return the files that importing a dotted name of the tests may execute."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        folder = ROOT.joinpath(*parts[:count])
        yield folder / "__init__.py"
        yield folder.with_suffix(".py")


def imported_names(node: ast.AST, *, is_lazy: bool = False) -> Iterator[tuple[str, bool]]:
    """Return the dotted names that code imports, and whether a function does; `if TYPE_CHECKING` is left out."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, is_lazy) for alias in node.names)
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        yield node.module, is_lazy
        yield from ((f"{node.module}.{alias.name}", is_lazy) for alias in node.names)
    is_checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    for child in node.orelse if isinstance(node, ast.If) and is_checking else ast.iter_child_nodes(node):
        in_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imported_names(child, is_lazy=is_lazy or in_function)


def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def distributions_of(module: str) -> set[str]:
    """Return the distributions that have a module, in this environment."""
    return {canonicalize_name(name) for name in all_distributions().get(module, [])}


@functools.cache
def all_distributions() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()


def roots_of(imports: Iterable[Import], provided: set[str]) -> list[str]:
    """Return the requirements to pack: the project's own, and those of tests and benchmarks that import them."""
    table = project()
    required = {name_of(text): text for text in table["dependencies"]}
    extras = {name_of(text): text for texts in table["optional-dependencies"].values() for text in texts}
    for item in imports:
        if not item.file.startswith("src/"):
            required |= {name: extras[name] for name in distributions_of(item.module) & set(extras)}
    return [text for name, text in sorted(required.items()) if name not in provided]


def name_of(requirement: str) -> str:
    return canonicalize_name(Requirement(requirement).name)


def check_imports(imports: Iterable[Import], provided: set[str], wheels: Iterable[Path]) -> list[str]:
    """Check that each import is provided, packed, or an optional one of the package.

    An import is optional where a function of the package imports what the project does not depend on, and where a
    module needs an extra.

    Returns:
        The optional modules that are neither packed nor provided.

    Raises:
        SystemExit: naming each module that is missing, and the files that import it.
    """
    packed = {module for wheel in wheels for module in modules_of(wheel)}
    required = {name_of(text) for text in project()["dependencies"]}
    extras = set(project()["optional-dependencies"])  # with the names of what they install
    optional, missing = set(), []
    for item in imports:
        distributions = distributions_of(item.module)
        if item.module in packed or distributions & provided:
            continue
        is_optional = item.is_lazy or item.module in extras
        if item.file.startswith("src/") and is_optional and not distributions & required:
            optional.add(item.module)
        else:
            missing.append(
                f"{item.file} imports {item.module} of {sorted(distributions) or 'unknown origin'}"
            )
    if missing:
        raise SystemExit("neither provided nor packed:\n" + "\n".join(missing))
    return sorted(optional)


def modules_of(wheel: Path) -> set[str]:
    """Return the modules that a wheel installs, at the top level."""
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist()}
    return {top.partition(".")[0] for top in tops if not top.endswith((".dist-info", ".data"))}


# Wheels


def download_wheels(requirements: Iterable[str], provided: set[str], folder: Path) -> list[Path]:
    """Download wheels of the requirements and of all that they require, without those that are provided."""
    folder.mkdir()
    waiting = {name_of(text): {text} for text in requirements}
    done: set[str] = set()
    while waiting:
        texts = sorted(text for group in waiting.values() for text in group)
        done |= set(waiting)
        waiting = {}
        before = set(folder.glob("*.whl"))
        pip_download(texts, folder)
        for wheel in sorted(set(folder.glob("*.whl")) - before):
            for text in requirements_of(wheel):
                if name_of(text) not in done | provided:
                    waiting.setdefault(name_of(text), set()).add(text)
    return sorted(folder.glob("*.whl"))


def pip_download(requirements: list[str], folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    command += ["--constraint", str(ROOT / "constraints.txt"), "--dest", str(folder), *requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")


def requirements_of(wheel: Path) -> list[str]:
    """Return what a wheel requires on the target; the markers are left out."""
    with zipfile.ZipFile(wheel) as archive:
        path = next(name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        headers = HeaderParser().parsestr(archive.read(path).decode())
    requirements = [Requirement(text) for text in headers.get_all("Requires-Dist") or []]
    return [
        f"{item.name}{item.specifier}"
        for item in requirements
        if item.marker is None or item.marker.evaluate(MARKERS)
    ]


# Data


def pack_data(
    sources: Iterable[SourceData], folder: Path, *, max_bytes: float, quality: int
) -> dict[str, dict[str, Any]]:
    """Write the data sets as JPEG, and only as many images as fit.

    Returns:
        By name: images before and after, boxes, the seed of the subset and the number of images re-encoded.
    """
    folder.mkdir()
    encoded = {source.name: encode_all(source, quality=quality) for source in sources}
    fraction = fitting_fraction(encoded, max_bytes)
    return {
        name: {
            split: write_split(folder / name, split, images, fraction=fraction, quality=quality)
            for split, images in splits.items()
        }
        for name, splits in encoded.items()
    }


@dataclass(frozen=True, kw_only=True)
class EncodedSplit:
    """The annotations of a split, and its JPEG files by image id."""

    coco: dict[str, Any]
    files: dict[int, bytes]
    num_reencoded: int


def encode_all(source: SourceData, *, quality: int) -> dict[str, EncodedSplit]:
    splits = {}
    for split, path in source.splits.items():
        coco = json.loads(path.read_text())
        with ThreadPoolExecutor(4) as pool:
            files = list(
                pool.map(
                    lambda image, folder=path.parent / "images": encode(folder / image["file_name"], quality),
                    coco["images"],
                )
            )
        splits[split] = EncodedSplit(
            coco=coco,
            files={image["id"]: data for image, (data, _) in zip(coco["images"], files, strict=True)},
            num_reencoded=sum(is_new for _, is_new in files),
        )
    return splits


def encode(path: Path, quality: int) -> tuple[bytes, bool]:
    """Return an image as JPEG, and whether it was encoded again."""
    original = path.read_bytes()
    with Image.open(path) as image:
        is_jpeg = image.format == "JPEG"
        gray = image.mode in ("L", "1", "I;16")
        buffer = io.BytesIO()
        image.convert("L" if gray else "RGB").save(buffer, "JPEG", quality=quality, optimize=True)
    if is_jpeg and len(original) <= buffer.tell():
        return original, False
    return buffer.getvalue(), True


def fitting_fraction(encoded: Mapping[str, Mapping[str, EncodedSplit]], max_bytes: float) -> float:
    """Return the largest fraction of images, in hundredths, whose files and annotations fit."""
    total = sum(
        sum(map(len, split.files.values())) + len(json.dumps(split.coco))
        for splits in encoded.values()
        for split in splits.values()
    )
    if not total:
        return 1.0
    # Subsets are random: their size differs from the fraction's by about a percent.
    fraction = min(
        np.floor(100 * (max_bytes / total if total <= max_bytes else 0.99 * max_bytes / total)) / 100, 1
    )
    if fraction <= 0:
        raise SystemExit(f"no image fits: wheels and weights leave {max_bytes / 1e6:.1f} MB")
    return float(fraction)


def write_split(
    folder: Path, split: str, encoded: EncodedSplit, *, fraction: float, quality: int, seed: int = 0
) -> dict[str, Any]:
    coco = encoded.coco
    count = max(round(fraction * len(coco["images"])), 1)
    drawn = np.sort(np.random.default_rng(seed).choice(len(coco["images"]), size=count, replace=False))
    images = []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for index in drawn.tolist():
        image = coco["images"][index]
        name = f"{split}_{Path(image['file_name']).stem}.jpg"
        (folder / "images" / name).write_bytes(encoded.files[image["id"]])
        images.append({**image, "file_name": name})
    kept = {image["id"] for image in images}
    annotations = [box for box in coco["annotations"] if box["image_id"] in kept]
    subset = {"images": images, "annotations": annotations, "categories": coco["categories"]}
    (folder / f"{split}.json").write_text(json.dumps(subset, separators=(",", ":")))
    return {
        "images": len(images),
        "of_images": len(coco["images"]),
        "annotations": len(annotations),
        "seed": seed if count < len(coco["images"]) else None,
        "reencoded_at_quality": quality if encoded.num_reencoded else None,
        "images_reencoded": encoded.num_reencoded,
    }


if __name__ == "__main__":
    main()
