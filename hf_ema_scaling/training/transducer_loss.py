"""One transducer loss per example, as transformers computes it over a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_rnnt import rnnt_loss
from transformers.loss.loss_tdt import tdt_loss
from transformers.models.auto.modeling_auto import MODEL_FOR_TDT_MAPPING_NAMES

from hf_ema_scaling.ema.adapters import base_of
from hf_ema_scaling.ema.sharding import class_of
from hf_ema_scaling.labels.ctc import ctc_frame_lengths


def transducer_losses(model: nn.Module, inputs: Mapping[str, Tensor], logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(label) / label length for each row, in nats per token.

    transformers counts -100 as a token and divides by the length of an empty label; here lengths are those of the
    label, and an empty one is refused.

    Args:
        model: `ParakeetForRNNT` or `ParakeetForTDT`, wrapped or not.
        inputs: `input_features` and `attention_mask`.
        logits: `(rows, frames, tokens + 1, vocabulary)`, of TDT with the durations behind the vocabulary: what the
            model makes of `decoder_input_ids` (`labels.transducer.decoder_inputs`).
        labels: int64 `(rows, tokens)`, padded with -100.

    Returns:
        float32 `(rows,)`.

    Raises:
        ValueError: if a row has no token.
    """
    lengths = (labels >= 0).sum(-1)
    if bool((lengths == 0).any()):
        row = int((lengths == 0).nonzero()[0])
        raise ValueError(f"row {row} has an empty target; drop rows without tokens before the loss")
    base: Any = base_of(model)
    config = base.config
    frames = ctc_frame_lengths(model, inputs).to(logits.device)
    # Both losses want tensors that are no larger than the longest row.
    longest = int(lengths.max())
    logits = logits[:, : int(frames.max()), : longest + 1].float().contiguous()
    shared: dict[str, Any] = {
        "targets": labels[:, :longest].clamp(min=0).int().contiguous(),
        "logit_lengths": frames.int(),
        "target_lengths": lengths.int(),
        "blank_token_id": config.blank_token_id,
        "reduction": "none",
    }
    if class_of(base).__name__ in MODEL_FOR_TDT_MAPPING_NAMES.values():
        size = config.vocab_size
        shared["targets"] = shared["targets"].long()
        losses = tdt_loss(logits[..., :size], logits[..., size:], durations=config.durations, **shared)
    else:
        losses = rnnt_loss(logits, **shared)
    return losses / torch.as_tensor(lengths, device=losses.device)
