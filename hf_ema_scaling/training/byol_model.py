"""The network of BYOL: an encoder, a projector, and a predictor that only the student uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import ModelOutput


class BYOLConfig(PreTrainedConfig):
    """Sizes of a `BYOLModel`.

    Args:
        backbone_config: configuration of a transformers model with pooled output as the encoder; None for a small
            convolutional network.
        num_channels: of the images, for the small network.
        encoder_channels: output channels of the small network's 3x3 convolutions; all but the first halve the image.
        hidden_size: of the hidden layer in projector and predictor.
        projection_size: of what is predicted.
        image_mean: subtracted from pixels in [0, 1], one value per channel or one for all.
        image_std: what the difference is divided by.
    """

    model_type = "byol"
    sub_configs: ClassVar[dict[str, Any]] = {"backbone_config": AutoConfig}

    def __init__(
        self,
        backbone_config: dict[str, Any] | PreTrainedConfig | None = None,
        num_channels: int = 3,
        encoder_channels: tuple[int, ...] | list[int] = (32, 64, 128),
        hidden_size: int = 256,
        projection_size: int = 64,
        image_mean: tuple[float, ...] | list[float] = (0.5,),
        image_std: tuple[float, ...] | list[float] = (0.5,),
        **kwargs: Any,
    ) -> None:
        if isinstance(backbone_config, dict):
            backbone_config = AutoConfig.for_model(**backbone_config)
        self.backbone_config = backbone_config
        self.num_channels = num_channels
        self.encoder_channels = list(encoder_channels)
        self.hidden_size = hidden_size
        self.projection_size = projection_size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        super().__init__(**kwargs)


@dataclass
class BYOLOutput(ModelOutput):
    """What a `BYOLModel` makes of images `(..., channels, height, width)`; leading dimensions stay.

    Args:
        logits: predictions of the other view's projection, `(..., projection_size)`.
        projections: `(..., projection_size)`; those of the average are the targets.
        features: of the encoder, `(..., features)`; what a linear probe is trained on.
    """

    logits: Tensor | None = None
    projections: Tensor | None = None
    features: Tensor | None = None


class BYOLModel(PreTrainedModel):
    """Encoder, projector and predictor (BYOL, arXiv 2006.07733). The target network is the same model, averaged.

    Projector and predictor are `Linear, BatchNorm, ReLU, Linear` as there. Several views of the images pass one after
    the other, so that BatchNorm's statistics are those of one view, as there.
    """

    config_class = BYOLConfig
    config: BYOLConfig
    base_model_prefix = "byol"
    main_input_name = "pixel_values"

    def __init__(self, config: BYOLConfig) -> None:
        super().__init__(config)
        backbone = config.backbone_config
        if backbone is None:
            self.encoder: nn.Module = ConvolutionalEncoder(config.num_channels, config.encoder_channels)
            size = config.encoder_channels[-1]
        else:
            self.encoder = AutoModel.from_config(backbone)
            size = feature_size(backbone)
        self.projector = _perceptron(size, config.hidden_size, config.projection_size)
        self.predictor = _perceptron(config.projection_size, config.hidden_size, config.projection_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BYOLOutput:
        """Predictions, projections and features of images, or of several views of each.

        Args:
            pixel_values: float in [0, 1], `(rows, channels, height, width)` or
                `(rows, views, channels, height, width)`.
        """
        if pixel_values.dim() == 4:
            return BYOLOutput(*self._of_images(pixel_values))
        views = [self._of_images(view) for view in pixel_values.unbind(1)]
        return BYOLOutput(*(torch.stack(parts, 1) for parts in zip(*views, strict=True)))

    def _of_images(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, std = (
            torch.tensor(values, device=images.device, dtype=images.dtype)[:, None, None]
            for values in (self.config.image_mean, self.config.image_std)
        )
        encoded = self.encoder((images - mean) / std)
        features = encoded if isinstance(encoded, Tensor) else encoded.pooler_output.flatten(1)
        projections = self.projector(features)
        return self.predictor(projections), projections, features


class ConvolutionalEncoder(nn.Sequential):
    """3x3 convolutions with BatchNorm and ReLU, for small images; features are the means over the last map.

    Args:
        channels: of the images.
        widths: output channels of the convolutions; all but the first halve the image.
    """

    def __init__(self, channels: int, widths: list[int]) -> None:
        parts: list[nn.Module] = []
        for number, width in enumerate(widths):
            convolution = nn.Conv2d(channels, width, 3, stride=1 if number == 0 else 2, padding=1, bias=False)
            parts += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        super().__init__(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def feature_size(config: PreTrainedConfig) -> int:
    """Length of a transformers model's pooled output.

    Raises:
        ValueError: when the configuration does not say.
    """
    sizes = getattr(config, "hidden_sizes", None)
    size = sizes[-1] if sizes else getattr(config, "hidden_size", None)
    if size is None:
        raise ValueError(f"{type(config).__name__} has no hidden_size: choose an image model with pooled output")
    return int(size)


def _perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outputs))
