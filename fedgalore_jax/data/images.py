"""Images of folders, parquet files and the hub, resized to a model's input.

Pixels stay the bytes they were, `[n, H, W, C]` uint8: a quarter of the memory of floats, on the host and on
the device. The model knows its own mean and standard deviation and normalises bytes as it reads them.
"""

import hashlib
import io
import json
import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedgalore_jax.data import tables
from fedgalore_jax.data.cache import Arrays, Empty, cached
from fedgalore_jax.data.dataset import Asked, Dataset, Source, Split, split_rows

log = logging.getLogger(__name__)

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
MOST_DAMAGED = 0.01
BILINEAR = 2
"""Pillow's number, which is transformers' too."""
SPLITS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


class Item(NamedTuple):
    """An image that was not opened yet.

    Attributes:
      file: a path, or encoded bytes.
      label: the class's name.
      split: "train", "validation", "test", or "" where a seeded split decides.
      domain: the natural key, or "".
      name: for messages.
    """

    file: pathlib.Path | bytes
    label: str
    split: str = ""
    domain: str = ""
    name: str = ""


def load(source: Source) -> Dataset:
    """A user's folder, `--task=images`: `class/*.jpg`, or `train/class/*.jpg` and `test/class/*.jpg`."""
    items, notes = folder(_root(source))
    data = build(items, source)
    return data._replace(notes=(*notes, *data.notes))


def read(source: Source, path: str) -> Asked:
    """Images to be classified: one file, or all below a folder, in the order of their names."""
    root = pathlib.Path(path)
    files = [root] if root.is_file() else sorted(f for f in root.rglob("*") if f.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"{path!r} holds no image ({', '.join(SUFFIXES)})")
    pixels, damaged = _open_all(files, source.model, None)
    if len(damaged):
        raise ValueError(f"{files[damaged[0]]} cannot be read as an image: repair or remove it")
    return Asked([str(f) for f in files], Split({"pixel_values": pixels}, np.zeros(len(files), np.int32)))


def domainnet(source: Source) -> Dataset:
    """DomainNet's layout `domain/class/*.jpg`; official lists `DOMAIN_train.txt`, `DOMAIN_test.txt` are used.

    Without the lists, each domain has a seeded tenth of its images for validation and a tenth as test.

    References:
      Peng et al., Moment matching for multi-source domain adaptation (1812.01754).
    """
    root = _root(source)
    official = {}
    for path in root.glob("*_t*.txt"):
        split = path.stem.rpartition("_")[2]
        if split in ("train", "test"):
            official |= {line.split()[0]: split for line in path.read_text().splitlines() if line.strip()}
    items = []
    for domain in _folders(root):
        for item in _items(domain, [(path, "") for path in _folders(domain)]):  # "train" is a class
            relative = pathlib.Path(str(item.file)).relative_to(root).as_posix()
            items.append(item._replace(domain=domain.name, split=official.get(relative, "")))
    return build(items, source)


def cifar(name: str, source: Source) -> Dataset:
    """CIFAR-10 or -100 from the hub, a folder of parquet files of its schema, or a folder of images.

    Args:
      name: "cifar10" or "cifar100" (fine labels).
      source: `data`, or None for the hub.
    """
    column = {"cifar10": "label", "cifar100": "fine_label"}[name]
    if source.data is None:
        found = tables.hub(f"uoft-cs/{name}", raw_images="img")
    elif any(path.suffix == ".parquet" for path in _root(source).iterdir()):
        found = tables.splits(source.data)
    else:
        return load(source)
    items = []
    for split, table in found.items():
        (images,) = tables.columns(table, ["img"], split, nested=True)
        (labels,) = tables.columns(table, [column], split)
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            name = f"image {i + 1} of {split}"
            if not isinstance(image, dict) or not isinstance(image.get("bytes"), bytes):
                raise ValueError(f"data={source.data!r}, {name}: column img must hold {{bytes, path}}")
            items.append(Item(image["bytes"], str(label), split, name=name))
    return build(items, source)


def folder(root: pathlib.Path) -> tuple[list[Item], list[str]]:
    """The images under `class/` or `split/class/`, and what was left out beside the splits.

    A folder without folders is a class, whatever its name.
    """
    first = _folders(root)
    named = [path for path in first if path.name in SPLITS and _folders(path)]
    pairs = [(p, SPLITS[split.name]) for split in named for p in _folders(split)] or [(p, "") for p in first]
    if named and not any(split == "train" for _, split in pairs):
        raise ValueError(
            f"data={str(root)!r} has no train/CLASS folders: there are {', '.join(p.name for p in named)}"
        )
    beside = [path.name for path in first if named and path not in named]
    left_out = f"{len(beside)} of {len(first)} folders are no split and were left out"
    notes = [f"{left_out}, such as {beside[0]}"] if beside else []
    return _items(root, pairs), notes


def _items(root: pathlib.Path, classes: Sequence[tuple[pathlib.Path, str]]) -> list[Item]:
    """The images of `(folder of a class, split)`."""
    items = [
        Item(file, path.name, split, name=str(file))
        for path, split in classes
        for file in sorted(path.iterdir())
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    ]
    if not items:
        raise ValueError(
            f"data={str(root)!r} is empty: put images into one folder a class ({', '.join(SUFFIXES)})"
        )
    if bare := {path for path, _ in classes} - {pathlib.Path(item.name).parent for item in items}:
        raise ValueError(f"{min(bare)} holds no image ({', '.join(SUFFIXES)}): put some there, or remove it")
    return items


def build(items: Sequence[Item], source: Source) -> Dataset:
    """Splits images, and opens them.

    What was opened once is kept in the cache, by the files' names, sizes and times.

    Args:
      items: all images; splits that none of them names are taken from the training ones (a seeded tenth
        each, domain by domain).
      source: the model's directory says which size and how many channels.

    Returns:
      A `Dataset`; with several domains, the test split of each that has one is in `more_tests`.

    Raises:
      ValueError: a class of the test split that training lacks; more than one image in a hundred is damaged.
      ImportError: Pillow is not installed.
    """
    split = np.array([item.split or "train" for item in items], dtype="U10")
    domain = np.array([item.domain for item in items])
    _complete(split, domain, np.array([item.label for item in items]), source.seed)
    order = np.lexsort((domain, split)).tolist()  # stable: what is read together lies together
    pixels, damaged = _open_all([items[i].file for i in order], source.model, source.cache)
    if len(damaged) > MOST_DAMAGED * len(items):
        raise ValueError(
            f"{len(damaged)} of {len(items)} images cannot be read, more than 1%; the first is"
            f" {items[order[damaged[0]]].name}: repair or remove them"
        )
    kept = np.delete(order, damaged).tolist()
    items, split, domain = [items[i] for i in kept], split[kept], domain[kept]
    trained = {item.label for item, where in zip(items, split, strict=True) if where == "train"}
    if strange := sorted({item.label for item in items} - trained):
        raise ValueError(f"class {strange[0]!r} has no training image: give it one, or drop it")
    if len(trained) < 2:
        raise ValueError(
            f"all images are of class {trained.pop()!r}: a classifier needs two classes at least"
        )
    names = tuple(sorted(sorted(trained), key=lambda name: name.zfill(9) if name.isdigit() else name))
    index = {name: i for i, name in enumerate(names)}
    labels = np.array([index[item.label] for item in items], np.int32)

    def part(chosen):
        first, n = chosen.argmax(), np.count_nonzero(chosen)
        return Split({"pixel_values": pixels[first : first + n]}, labels[first : first + n])

    train, validation, test = (part(split == name) for name in ("train", "validation", "test"))
    if empty := [name for name in ("validation", "test") if name not in split]:
        raise ValueError(f"no image of the {empty[0]} split can be read: repair them, or add others")
    notes = (f"{len(damaged)} of {len(items) + len(damaged)} images cannot be read and were skipped",)
    domains, domain_names, more = None, tuple(sorted(set(domain.tolist()) - {""})), {}
    if domain_names:
        domains = np.searchsorted(domain_names, domain[split == "train"]).astype(np.int32)
        tests = {name: part((split == "test") & (domain == name)) for name in domain_names}
        more = {name: own for name, own in tests.items() if len(own.labels) and len(tests) > 1}
    return Dataset(
        train, validation, test, len(names), labels[split == "train"], names, domains, domain_names, more,
        notes=notes if len(damaged) else (),
    )  # fmt: skip


def _complete(split: np.ndarray, domain: np.ndarray, labels: np.ndarray, seed: int) -> None:
    """Moves seeded tenths of the training images into the splits that are missing, in place."""
    for name in sorted(set(domain.tolist())):
        here = domain == name
        missing = [part for part in ("validation", "test") if not (split[here] == part).any()]
        rows = np.flatnonzero(here & (split == "train"))
        if missing:
            parts = split_rows(len(rows), [0.1] * len(missing), seed, [labels[rows]])
            for part, chosen in zip(missing, parts[1:], strict=True):
                split[rows[chosen]] = part


def model_input(model: pathlib.Path) -> tuple[int, int]:
    """The side of the square images that a model reads, and their channels."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if "image_size" not in config:
        raise ValueError(f"{model} is a {config.get('model_type')} model and reads no images: choose a ViT")
    return config["image_size"], config.get("num_channels", 3)


def _open_all(
    files: Sequence[pathlib.Path | bytes], model: pathlib.Path, cache: pathlib.Path | None
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels `[n - damaged, size, size, channels]` uint8 of what can be read, and what cannot."""
    size, channels = model_input(model)
    read, processor = reader(size, channels), model / "preprocessor_config.json"
    if processor.exists():
        asked = json.loads(processor.read_text(encoding="utf-8"))
        if asked.get("do_center_crop") or asked.get("resample", BILINEAR) != BILINEAR:
            log.warning(
                "%s crops, or resizes otherwise: here whole images are resized to %d x %d, bilinear",
                processor,
                size,
                size,
            )

    def compute(empty: Empty) -> Arrays:
        good, damaged = 0, []
        pixels = empty("pixels", (len(files), size, size, channels), np.uint8)
        for i, file in enumerate(files):
            try:
                pixels[good] = read(file)
                good += 1
            except (OSError, ValueError, SyntaxError):  # what Pillow raises for broken files
                damaged.append(i)
        return {"pixels": pixels, "damaged": np.array(damaged, int)}

    key = ("upright images", size, channels, [_fingerprint(file) for file in files])
    arrays = cached(cache, key, compute)
    damaged = arrays["damaged"]
    return arrays["pixels"][: len(files) - len(damaged)], damaged


def _fingerprint(file: pathlib.Path | bytes) -> Any:
    if isinstance(file, bytes):
        return hashlib.sha256(file).hexdigest()
    seen = file.stat()
    return str(file.absolute()), seen.st_size, seen.st_mtime_ns


def reader(size: int, channels: int) -> Callable[[Any], np.ndarray]:
    """A function from a path or encoded bytes to pixels `[size, size, channels]` uint8, bilinear as ViT's."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("images are read by Pillow: pip install pillow") from error
    if (mode := {1: "L", 3: "RGB"}.get(channels)) is None:
        raise ValueError(f"num_channels={channels}: images have 1 or 3, choose a model that reads such")

    def read(file: pathlib.Path | bytes) -> np.ndarray:
        try:
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
                try:
                    upright = ImageOps.exif_transpose(image)  # as the camera was held
                except Exception:  # damaged notes on a picture are none, whatever Pillow stumbles over
                    upright = image
                if upright.mode.startswith("I"):  # 16 bits of gray, which `convert` would clip at 255
                    upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
                small = upright.convert(mode).resize((size, size), Image.Resampling(BILINEAR))
        except Image.DecompressionBombError as error:
            raise ValueError(str(error)) from None
        return np.asarray(small).reshape(size, size, channels)

    return read


def _root(source: Source) -> pathlib.Path:
    if source.data is None:
        raise ValueError("data is missing: give the folder of the images")
    root = pathlib.Path(source.data)
    if not root.is_dir():
        raise FileNotFoundError(f"data={source.data!r} is not a folder")
    return root


def _folders(root: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
