"""Images that come with scikit-learn, from the Hub, from image folders, from saved data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Image, load_dataset, load_from_disk

from hf_ema_scaling.data.images import DecodedImages, ImageRows
from hf_ema_scaling.recipe.sources import _from_hub

DIGITS_TEST = 3
"""Every third of the digits is for evaluation."""


def load_images(
    source: str, *, image_column: str = "image", label_column: str | None = "label", size: int, channels: int
) -> ImageRows:
    """The images of a source, and their labels, in the order they have there.

    Args:
        source: as in `ImageDataArguments`.
        image_column: column of the images.
        label_column: column of integer labels or class names' numbers; None where they must not be read.
        size: height and width that images are resized to; 8 for digits, which are never resized.
        channels: 1 for grey, 3 for colour.

    Raises:
        FileNotFoundError: for a local source that is not there.
        ImportError: for digits without scikit-learn.
        ValueError: for a source that cannot be loaded, has no rows, or lacks a column.
    """
    name, _, split = source.partition(":")
    if name == "digits":
        return _digits(split, labels=label_column is not None, size=size, channels=channels)
    dataset = _found(source)
    wanted = [image_column] if label_column is None else [image_column, label_column]
    missing = [column for column in wanted if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"{source}: no column {', '.join(missing)}; it has {', '.join(dataset.column_names)}. Name the columns by "
            "image_column and label_column"
        )
    if not len(dataset):
        raise ValueError(f"{source}: no rows")
    if not isinstance(dataset.features[image_column], Image):
        raise ValueError(
            f"{source}: column {image_column!r} holds {dataset.features[image_column]}, not images; cast it to "
            "datasets.Image first"
        )
    labels = None
    if label_column is not None:
        feature = dataset.features[label_column]
        if not isinstance(feature, ClassLabel) and "int" not in str(getattr(feature, "dtype", "")):
            raise ValueError(
                f"{source}: column {label_column!r} holds {feature}, not classes: use class_encode_column"
            )
        labels = [int(label) for label in dataset[label_column][:]]
    return ImageRows(DecodedImages(dataset, image_column, size=size, channels=channels), len(dataset), labels)


def _digits(split: str, *, labels: bool, size: int, channels: int) -> ImageRows:
    """The 1797 handwritten digits of 8x8 pixels in scikit-learn; 16 levels become 0, 15, ..., 240."""
    if split not in ("train", "test"):
        raise ValueError(f"digits come as digits:train and digits:test, got {split!r}")
    if (size, channels) != (8, 1):
        raise ValueError(f"digits are of image_size 8 with 1 channel, got {size} with {channels}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn: pip install 'hf-ema-scaling[byol]', or name another source"
        ) from error
    loaded: Any = load_digits()
    rows = np.arange(len(loaded.images))
    rows = rows[(rows % DIGITS_TEST == 0) == (split == "test")]
    images = torch.from_numpy((loaded.images[rows] * 15).astype(np.uint8))[:, None]
    return ImageRows(images.__getitem__, len(rows), loaded.target[rows].tolist() if labels else None)


def _found(source: str) -> Dataset:
    before, _, split = source.rpartition(":")
    path, part = (Path(source), "") if Path(source).exists() or not before else (Path(before), split)
    if not path.exists():
        if source.startswith((".", "/", "~")):
            raise FileNotFoundError(f"{source}: no such folder, seen from {Path.cwd()}")
        return _from_hub(source)
    saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    loaded: Any = load_from_disk(str(path)) if saved else load_dataset("imagefolder", data_dir=str(path))
    if isinstance(loaded, Dataset):
        if part:
            raise ValueError(f"{path} has no splits, so there is no {part!r} in it: write {path}")
        return loaded
    if not part and len(loaded) == 1:
        return next(iter(loaded.values()))
    if part not in loaded:
        raise ValueError(
            f"{path} has the splits {', '.join(loaded)}: write one of them as {path}:{next(iter(loaded))}"
        )
    return loaded[part]
