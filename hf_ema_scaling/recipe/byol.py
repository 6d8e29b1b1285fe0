"""The recipe for BYOL on images: its arguments, its data and model, its trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModel, set_seed

from hf_ema_scaling.data.images import RandomViews
from hf_ema_scaling.recipe.asr_ctc import new_config
from hf_ema_scaling.recipe.images import load_images
from hf_ema_scaling.training import EMATrainingArguments
from hf_ema_scaling.training.byol import BYOLTrainer
from hf_ema_scaling.training.byol_model import BYOLConfig, BYOLModel


@dataclass
class ImageDataArguments:
    """Where images come from. A source is written in one of these ways (see `load_images`).

    `digits:train`, `digits:test`: the 8x8 digits of scikit-learn (`pip install 'hf-ema-scaling[byol]'`);
    `data/folder`, `data/folder:split`: an image folder (one folder per class), or a saved `datasets` folder;
    `owner/name:split`, `owner/name:config:split`: the Hub.
    """

    images: str = field(metadata={"help": "Source of training images; their labels are for the linear probe alone."})
    evaluation: str | None = field(
        default=None, metadata={"help": "Source of labelled images on which the linear probe is evaluated."}
    )
    image_column: str = field(default="image", metadata={"help": "Column with the images, in every source."})
    label_column: str = field(default="label", metadata={"help": "Column with the classes."})
    image_size: int = field(default=32, metadata={"help": "Height and width that images are resized to."})
    num_channels: int = field(default=3, metadata={"help": "1 for grey images, 3 for colour."})

    def __post_init__(self) -> None:
        if self.num_channels not in (1, 3):
            raise ValueError(f"num_channels must be 1 or 3, got {self.num_channels}")
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {self.image_size}")


@dataclass
class BYOLModelArguments:
    """Which encoder, and the sizes of projector and predictor."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A transformers image model with pooled output to start from, or ..."}
    )
    model_config: str | None = field(
        default=None,
        metadata={
            "help": "... the configuration of one to train from scratch: a mapping with model_type. Neither: a small "
            "convolutional network."
        },
    )
    encoder_channels: list[int] = field(
        default_factory=lambda: [32, 64, 128], metadata={"help": "Widths of the small network's convolutions."}
    )
    hidden_size: int = field(default=256, metadata={"help": "Hidden layer of projector and predictor."})
    projection_size: int = field(default=64, metadata={"help": "Size of what is predicted."})
    init_seed: int | None = field(
        default=None,
        metadata={
            "help": "Seed of the initialisation; default: seed. Runs that share it may differ in order and views."
        },
    )

    def __post_init__(self) -> None:
        if self.model_name_or_path is not None and self.model_config is not None:
            raise ValueError(
                f"give model_name_or_path or model_config, not both: got {self.model_name_or_path!r} and "
                f"{self.model_config!r}"
            )


@dataclass
class ViewArguments:
    """Random views of the images, see `RandomViews`."""

    min_scale: float = field(default=1.0, metadata={"help": "Smallest side of a crop, as a share of the image's."})
    shift: float = field(default=0.0, metadata={"help": "Further shift, up to this share of the side."})
    rotation: float = field(default=0.0, metadata={"help": "Largest rotation either way, in degrees."})
    flip: float = field(default=0.0, metadata={"help": "Probability of a horizontal flip."})
    contrast: float = field(default=0.0, metadata={"help": "Contrast changes by a factor up to 1 +- contrast."})
    brightness: float = field(default=0.0, metadata={"help": "Added to all pixels, up to +- brightness."})
    noise: float = field(default=0.0, metadata={"help": "Standard deviation of noise on every pixel in [0, 1]."})
    occlusion: float = field(default=0.0, metadata={"help": "Side of a square set to the mean, as a share."})

    def build(self) -> RandomViews:
        """What makes the views."""
        return RandomViews(**vars(self))


BYOL = (ImageDataArguments, BYOLModelArguments, ViewArguments, EMATrainingArguments)
"""The arguments of `build_byol`, for `parse`."""


def build_byol(
    data: ImageDataArguments, model: BYOLModelArguments, views: ViewArguments, args: EMATrainingArguments
) -> BYOLTrainer:
    """The trainer of a BYOL recipe; with `evaluation` it reports the accuracy of a linear probe.

    Raises:
        ValueError, FileNotFoundError, ImportError: for what cannot be used, by name.
    """
    shape: dict[str, Any] = {"size": data.image_size, "channels": data.num_channels, "image_column": data.image_column}
    with args.main_process_first(desc="preparing images"):
        labels = None if data.evaluation is None else data.label_column
        probe = load_images(data.images, label_column=labels, **shape)
        evaluation = None
        if data.evaluation is not None:
            evaluation = load_images(data.evaluation, label_column=labels, **shape)
    set_seed(args.seed if model.init_seed is None else model.init_seed)
    return BYOLTrainer(
        _network(model, data.num_channels),
        args,
        views=views.build(),
        train_dataset=probe.without_labels(),
        eval_dataset=evaluation,
        probe_dataset=None if evaluation is None else probe,
    )


def _network(model: BYOLModelArguments, channels: int) -> BYOLModel:
    heads: dict[str, Any] = {"hidden_size": model.hidden_size, "projection_size": model.projection_size}
    if model.model_config is not None:
        return BYOLModel(BYOLConfig(new_config(model.model_config), num_channels=channels, **heads))
    name = model.model_name_or_path
    if name is None:
        return BYOLModel(BYOLConfig(num_channels=channels, encoder_channels=model.encoder_channels, **heads))
    # Not every recipe has Pillow at hand.
    from transformers.image_processing_base import ImageProcessingMixin

    encoder = AutoModel.from_pretrained(name, dtype=torch.float32)
    processing, _ = ImageProcessingMixin.get_image_processor_dict(name)
    pixels = {key: processing[key] for key in ("image_mean", "image_std") if key in processing}
    network = BYOLModel(BYOLConfig(encoder.config, num_channels=channels, **heads, **pixels))
    network.encoder.load_state_dict(encoder.state_dict())
    return network
