"""One loss per example, from logits and labels: the trainers own the loss, the model only computes logits.

Each function returns one value per row, so that dropping, weighting and capping rows is plain arithmetic and the sum
can be divided by a constant of the plan. Losses are computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_CTC_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from hf_ema_scaling.ema.adapters import base_of
from hf_ema_scaling.ema.sharding import class_of
from hf_ema_scaling.labels.ctc import blank_id, ctc_frame_lengths
from hf_ema_scaling.labels.decoder import TRANSDUCERS, is_encoder_decoder
from hf_ema_scaling.training.transducer_loss import transducer_losses

ExampleLoss = Callable[[nn.Module, Mapping[str, Tensor], Tensor, Tensor], Tensor]
"""`(model, inputs, logits, labels) -> losses (rows,)`."""


def ctc_losses(logits: Tensor, frame_lengths: Tensor, labels: Tensor, blank: int) -> Tensor:
    """-log p(target) / target length for each row, in nats per token.

    Args:
        logits: `(rows, frames, vocabulary)`, any float dtype.
        frame_lengths: int64 `(rows,)`, valid frames of each row.
        labels: int64 `(rows, tokens)`, padded with -100.
        blank: id of the blank.

    Returns:
        float32 `(rows,)`; infinite where the frames cannot hold the target.

    Raises:
        ValueError: if a row has no target token: its loss has no length to be divided by.
    """
    mask = labels >= 0
    target_lengths = mask.sum(-1)
    if bool((target_lengths == 0).any()):
        row = int((target_lengths == 0).nonzero()[0])
        raise ValueError(f"row {row} has an empty target; drop rows without tokens before the loss")
    log_probabilities = F.log_softmax(logits, dim=-1, dtype=torch.float32).transpose(0, 1)
    with torch.backends.cudnn.flags(enabled=False):
        losses = F.ctc_loss(
            log_probabilities, labels[mask], frame_lengths, target_lengths, blank=blank, reduction="none"
        )
    return losses / target_lengths


def classification_losses(logits: Tensor, labels: Tensor, problem_type: str) -> Tensor:
    """Cross-entropy, mean binary cross-entropy over classes, or mean squared error for each row.

    Args:
        logits: `(rows, classes)`.
        labels: int64 `(rows,)` for `single_label_classification`, float `(rows, classes)` otherwise. There, floats of
            that shape are probabilities of the classes (soft labels).
        problem_type: as in a transformers config.

    Raises:
        ValueError: for probabilities of another shape.
    """
    scores = logits.float()
    if problem_type == "single_label_classification" and labels.is_floating_point():
        if labels.shape != scores.shape:
            raise ValueError(
                f"labels in floats are probabilities by class, {tuple(scores.shape)}, got {tuple(labels.shape)}: for "
                "one class per row give int64, for several problem_type='multi_label_classification'"
            )
        return F.cross_entropy(scores, labels.float(), reduction="none")
    if problem_type == "single_label_classification":
        return F.cross_entropy(scores, labels.view(-1), reduction="none")
    targets = labels.to(scores.dtype).view_as(scores)
    if problem_type == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(scores, targets, reduction="none").mean(-1)
    return F.mse_loss(scores, targets, reduction="none").mean(-1)


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, averaged over the tokens of each row that have a label (others are -100).

    Args:
        logits: `(rows, tokens, classes)`; of a decoder, `(rows, tokens, vocabulary)`.
        labels: int64 `(rows, tokens)`.
    """
    losses = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return losses.sum(-1) / (labels != -100).sum(-1).clamp(min=1)


def causal_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the next token, averaged over the tokens of each row that have a label (others are -100).

    Args:
        logits: `(rows, tokens, vocabulary)`; those at one token are about the next.
        labels: int64 `(rows, tokens)`, in the places of the inputs; the first has nothing before it and is left out.
    """
    return token_losses(logits[:, :-1], labels[:, 1:])


def byol_losses(predictions: Tensor, targets: Tensor) -> Tensor:
    """BYOL's loss for each row: `2 - 2 cos` of each view's prediction and the other view's target, summed over both.

    Args:
        predictions: of the student, `(rows, 2 views, size)`.
        targets: projections of the average, likewise; no gradient reaches them.

    Returns:
        float32 `(rows,)` in [0, 8].

    Source: "Bootstrap your own latent", arXiv 2006.07733, eq. 2.
    """
    cosines = F.cosine_similarity(predictions.float(), targets.detach().float().flip(1), dim=-1)
    return (2 - 2 * cosines).sum(-1)


def cap_losses(losses: Tensor, maximum: float | None) -> Tensor:
    """Losses above `maximum` are scaled down to it, gradient and all, so that no example can dominate a batch."""
    if maximum is None:
        return losses
    scaled = losses * (maximum / losses.detach().clamp(min=maximum))
    # Infinity times zero would be NaN.
    return torch.where(losses.detach() == math.inf, torch.full_like(losses, maximum), scaled)


def is_ctc(model: nn.Module) -> bool:
    """Whether the model is one of transformers' CTC heads."""
    return class_of(base_of(model)).__name__ in MODEL_FOR_CTC_MAPPING_NAMES.values()


def is_token_classifier(model: nn.Module) -> bool:
    """Whether the model is one of transformers' heads that classify tokens."""
    return class_of(base_of(model)).__name__ in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values()


def labels_by_token(model: nn.Module) -> bool:
    """Whether every label belongs to one token of the input: token classifiers, and causal language models."""
    causal = class_of(base_of(model)).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return is_token_classifier(model) or (causal and not is_encoder_decoder(model))


def loss_for(model: nn.Module) -> ExampleLoss:
    """The per-example loss of a transformers model, by the kind of its head.

    Raises:
        NotImplementedError: for heads without one; pass `example_loss=` to the trainer instead.
    """
    name = class_of(base_of(model)).__name__
    if is_ctc(model):
        blank = blank_id(model.config)

        def ctc(model: nn.Module, inputs: Mapping[str, Tensor], logits: Tensor, labels: Tensor) -> Tensor:
            return ctc_losses(logits, ctc_frame_lengths(model, inputs).to(logits.device), labels, blank)

        return ctc
    if name in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values():
        config: Any = model.config

        def classification(model: nn.Module, inputs: Mapping[str, Tensor], logits: Tensor, labels: Tensor) -> Tensor:
            return classification_losses(logits, labels, config.problem_type or _problem_type(config, labels))

        return classification
    written = (MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
    sequences = is_encoder_decoder(model) and any(name in names.values() for names in written)
    if sequences or is_token_classifier(model):

        def tokens(model: nn.Module, inputs: Mapping[str, Tensor], logits: Tensor, labels: Tensor) -> Tensor:
            return token_losses(logits, labels)

        return tokens
    if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and not is_encoder_decoder(model):

        def causal(model: nn.Module, inputs: Mapping[str, Tensor], logits: Tensor, labels: Tensor) -> Tensor:
            return causal_losses(logits, labels)

        return causal
    if name in TRANSDUCERS:
        return transducer_losses
    raise NotImplementedError(
        f"no per-example loss is known for {name}: pass example_loss=(model, inputs, logits, labels) -> (rows,) to "
        "the trainer"
    )


def _problem_type(config: Any, labels: Tensor) -> str:
    """What transformers would infer from the first labels."""
    if config.num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
