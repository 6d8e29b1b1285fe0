"""Greedy CTC labels: best path, cut to length, repeats merged, then blanks dropped (Graves et al. 2006, section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hf_ema_scaling.ema.adapters import base_of
from hf_ema_scaling.ema.sharding import class_of
from hf_ema_scaling.labels.base import CONFIDENCE, LabelKind, PseudoLabel
from hf_ema_scaling.labels.forward import teacher_logits
from hf_ema_scaling.labels.score_filters import LOG_PROBABILITY

MODEL_INPUTS = ("input_values", "input_features", "attention_mask")
LOOKS_PAST_THE_MASK = ("Data2VecAudioForCTC", "SEWForCTC", "SEWDForCTC", "Wav2Vec2ConformerForCTC")
LENGTH_METHODS = ("_get_feat_extract_output_lengths", "_get_subsampling_output_length")


def unwrapped(model: Any) -> Any:
    """The model inside `DistributedDataParallel` and `torch.compile` wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and not any(hasattr(model, method) for method in LENGTH_METHODS):
            inner = getattr(model, "module", None)
        if inner is None:
            return model
        model = inner


def ctc_frame_lengths(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Number of valid output frames of each row.

    Args:
        model: a CTC model of transformers, possibly wrapped.
        batch: `input_values` (rows, samples) or `input_features` (rows, frames, bins), padded on the right, and an
            optional `attention_mask` (rows, samples or frames) of ones and zeros. Without a mask every row is full.

    Returns:
        int64 tensor (rows,), on the device of the inputs.

    Raises:
        ValueError: when the batch holds neither input.
        TypeError: when the model does not say how it shortens its input.
    """
    inputs = next((batch[name] for name in ("input_values", "input_features") if name in batch), None)
    if inputs is None:
        raise ValueError(f"a CTC batch needs 'input_values' or 'input_features', got {sorted(batch)}")
    mask = batch.get("attention_mask")
    if mask is None:
        lengths = torch.full((inputs.shape[0],), inputs.shape[1], dtype=torch.long, device=inputs.device)
    else:
        lengths = mask.long().sum(-1)
    return frames_of(model, lengths)


def frames_of(model: Any, lengths: Tensor) -> Tensor:
    """Number of output frames that a CTC model makes of inputs of these lengths.

    Args:
        model: a CTC model of transformers, possibly wrapped.
        lengths: int64 (rows,), in samples of `input_values` or frames of `input_features`.

    Raises:
        TypeError: when the model does not say how it shortens its input.
    """
    model = unwrapped(model)
    method = next((getattr(model, name) for name in LENGTH_METHODS if hasattr(model, name)), None)
    if method is None:
        raise TypeError(
            f"{type(model).__name__} does not tell how many CTC frames it makes of its input: give it one of the "
            f"methods {', '.join(LENGTH_METHODS)}, mapping input lengths to output lengths"
        )
    # Moonshine's knows one length only, and gives a number.
    return torch.as_tensor(method(lengths), device=lengths.device).long().clamp(min=0)


def blank_id(config: Any) -> int:
    """The blank of a CTC head of transformers, which is `config.pad_token_id`.

    Raises:
        ValueError: when the config has none, or its blank is another id (OmniASR).
    """
    blank = getattr(config, "pad_token_id", None)
    other = getattr(config, "blank_token_id", blank)
    if other != blank:
        raise ValueError(
            f"the blank of {type(config).__name__} is id {other}, its padding id {blank}: only CTC heads whose blank "
            "is their padding are supported"
        )
    if blank is None:
        raise ValueError(
            f"{type(config).__name__}.pad_token_id is None, so the CTC blank is unknown: set it to the blank's id "
            "(tokenizer.pad_token_id)"
        )
    return int(blank)


def sees_padding(model: Any) -> bool:
    """Whether what a CTC model of transformers says of a row depends on the padding behind it, mask or not.

    Convolutions past the mask do it (SEW, Data2VecAudio, Wav2Vec2-Conformer, adapters that shorten the output), and
    norms over time (`feat_extract_norm="group"`). The tests measure it for each head.

    Args:
        model: a CTC model, possibly wrapped.
    """
    model = base_of(unwrapped(model))
    config = getattr(model, "config", None)
    return (
        class_of(model).__name__ in LOOKS_PAST_THE_MASK
        or bool(getattr(config, "add_adapter", False))
        or getattr(config, "feat_extract_norm", None) == "group"
    )


def non_target_ids(tokenizer: Any) -> frozenset[int]:
    """Ids that are never a CTC target: pad (the blank), bos, eos and unk of the tokenizer, as far as it has them.

    Not `all_special_ids`: for `Wav2Vec2CTCTokenizer` that holds the word delimiter, without which words run together.
    """
    ids = (getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "unk"))
    return frozenset(int(i) for i in ids if i is not None)


def min_ctc_frames(ids: Sequence[int]) -> int:
    """Frames that CTC needs for a label: one per token, and a blank between equal neighbours."""
    return len(ids) + sum(left == right for left, right in pairwise(ids))


def _check_shapes(logits: Tensor, frame_lengths: Tensor) -> None:
    if logits.ndim != 3 or frame_lengths.shape != logits.shape[:1]:
        raise ValueError(
            f"expected logits (rows, frames, vocabulary) and one length per row, got {tuple(logits.shape)} and "
            f"{tuple(frame_lengths.shape)}"
        )


def _collapse(best: Tensor, frame_lengths: Tensor, dropped: Tensor) -> list[list[int]]:
    """Cut `best` (rows, frames) to length, merge repeats, then remove the ids in `dropped`; all on the CPU."""
    longest = int(frame_lengths.max()) if len(frame_lengths) else 0
    if longest > best.shape[1]:
        raise ValueError(f"a row claims {longest} frames, but the logits have {best.shape[1]}")
    keep = torch.arange(best.shape[1])[None] < frame_lengths[:, None]
    keep[:, 1:] &= best[:, 1:] != best[:, :-1]
    keep &= ~torch.isin(best, dropped)
    flat = best[keep].tolist()
    rows, start = [], 0
    for count in keep.sum(1).tolist():
        rows.append(flat[start : start + count])
        start += count
    return rows


def greedy_ctc(logits: Tensor, frame_lengths: Tensor, blank: int) -> list[list[int]]:
    """Label of the best path of each row.

    Args:
        logits: (rows, frames, vocabulary), any float dtype.
        frame_lengths: (rows,), valid frames of each row; what lies behind is never looked at.
        blank: id of the blank.

    Returns:
        One list of ids per row, without blanks. `[1, 2, 3, 0, 3, 4]` with blank 0 gives `[1, 2, 3, 3, 4]`.

    Raises:
        ValueError: when the shapes do not fit, or a length exceeds the number of frames.
    """
    _check_shapes(logits, frame_lengths)
    return _collapse(logits.argmax(-1).cpu(), frame_lengths.cpu(), torch.tensor([blank]))


def labels_differ(logits: Tensor, frame_lengths: Tensor, labels: Tensor, dropped: Tensor) -> Tensor:
    """Whether the best path of each row says something else than its label, without leaving the device.

    Args:
        logits: (rows, frames, vocabulary).
        frame_lengths: (rows,), valid frames of each row.
        labels: int64 (rows, tokens), padded with -100.
        dropped: ids that are no part of a label, the blank among them.

    Returns:
        bool (rows,).
    """
    best = logits.argmax(-1)
    rows, frames = best.shape
    keep = torch.arange(frames, device=best.device)[None] < frame_lengths.to(best.device)[:, None]
    keep[:, 1:] &= best[:, 1:] != best[:, :-1]
    keep &= ~torch.isin(best, dropped.to(best.device))
    # What is kept moves to the left; all else goes to a column that nobody looks at.
    width = max(frames, labels.shape[1])
    places = torch.where(keep, keep.cumsum(1) - 1, width)
    found = torch.full((rows, width + 1), -100, device=best.device, dtype=best.dtype).scatter(1, places, best)
    wanted = torch.full_like(found, -100)
    wanted[:, : labels.shape[1]] = labels.clamp(min=-100)
    return (found != wanted)[:, :width].any(1)


def _parts(model: Any, inputs: dict[str, Tensor]) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """The batch, or its rows of each length without padding where the model would see that; with their numbers."""
    mask = inputs.get("attention_mask")
    lengths = [] if mask is None else mask.long().sum(-1).tolist()
    if len(set(lengths)) < 2 or not sees_padding(model):
        yield list(range(len(next(iter(inputs.values()))))), inputs
        return
    for length in sorted(set(lengths), reverse=True):
        rows = [row for row, found in enumerate(lengths) if found == length]
        yield rows, {name: values[rows, :length] for name, values in inputs.items()}


class CTCLabeler:
    """Greedy CTC labels with a confidence.

    The confidence of a row is the geometric mean over its valid frames of the highest class probability, blank
    included: `exp(mean_t log max_c p(c | t))`. It is the probability of the best path, per frame, so it does not
    shrink with length. A row without frames has confidence 0.

    Scores: `blank`, the share of frames whose best class is the blank, and `log_probability`, the logarithm of the
    confidence.

    Reasons: "empty" when no token is left, "too_long" when CTC needs more frames than the target has.

    Args:
        blank_id: id of the blank.
        special_ids: ids that are never a target (bos, eos, unk: see `non_target_ids`); removed after repeats are
            merged.
    """

    kind = LabelKind.TOKENS
    score_names = frozenset({CONFIDENCE, "blank", LOG_PROBABILITY})

    def __init__(self, blank_id: int, special_ids: Collection[int] = ()) -> None:
        self.blank_id = blank_id
        self.special_ids = frozenset(special_ids) - {blank_id}
        self._dropped = torch.tensor([blank_id, *sorted(self.special_ids)])

    @property
    def no_targets(self) -> Tensor:
        """Ids that are no part of a label: the blank and `special_ids`, int64."""
        return self._dropped

    def label(self, teacher: Callable[..., Any], batch: Mapping[str, Tensor]) -> list[PseudoLabel]:
        """Run the teacher on the inputs of `batch`, and on nothing else in it, and label each row.

        Where the model would see the padding (`sees_padding`), rows of one length are run together, without padding:
        slower, but a row's label is its own. Without an `attention_mask` the lengths are not known: give such models
        rows of one length.

        Args:
            teacher: a CTC model in eval mode, possibly wrapped.
            batch: as in `ctc_frame_lengths`; other keys are ignored.

        Raises:
            RuntimeError: when the teacher is in train mode.
            ValueError: when valid logits are NaN.
        """
        inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
        labels: dict[int, PseudoLabel] = {}
        for rows, part in _parts(teacher, inputs):
            frames = ctc_frame_lengths(teacher, part)
            if part is not inputs and not bool(frames.any()):
                found = [PseudoLabel((), 0.0, "empty")] * len(rows)  # too short for the convolutions
            else:
                found = self.from_logits(teacher_logits(teacher, part), frames)
            labels |= dict(zip(rows, found, strict=True))
        return [labels[row] for row in range(len(labels))]

    def from_logits(
        self, logits: Tensor, frame_lengths: Tensor, target_frames: Tensor | None = None
    ) -> list[PseudoLabel]:
        """Label each row of `logits` (rows, frames, vocabulary).

        Args:
            logits: any float dtype; the softmax is taken in float32.
            frame_lengths: (rows,), valid frames of each row.
            target_frames: (rows,), frames of the model that will be trained on the labels, where it shortens its
                input more than the teacher does; the teacher's own when None. Only it can make a label too long: a
                best path always fits the frames it came from.

        Raises:
            ValueError: when valid logits are NaN, or the shapes do not fit.
        """
        _check_shapes(logits, frame_lengths)
        lengths = frame_lengths.cpu()
        frames = logits.shape[1]
        scores = logits.float()
        best = scores.max(-1)
        log_best = (best.values - scores.logsumexp(-1)).cpu()
        valid = torch.arange(frames)[None] < lengths[:, None]
        log_best = log_best.masked_fill(~valid, 0.0)
        broken = torch.isnan(log_best).any(1).nonzero().flatten().tolist()
        if broken:
            raise ValueError(f"the teacher's logits are NaN in rows {broken} of the batch: it has diverged")
        confidence = (log_best.double().sum(1) / lengths.clamp(min=1)).exp().masked_fill(lengths == 0, 0.0)
        indices = best.indices.cpu()
        blanks = ((indices == self.blank_id) & valid).sum(1) / lengths.clamp(min=1)
        rows = _collapse(indices, lengths, self._dropped)
        available = lengths if target_frames is None else target_frames.cpu()
        return [
            PseudoLabel(
                tuple(ids),
                min(score, 1.0),
                self._reason(ids, room),
                scores={"blank": blank, LOG_PROBABILITY: math.log(score) if score > 0 else -math.inf},
            )
            for ids, score, room, blank in zip(
                rows, confidence.tolist(), available.tolist(), blanks.tolist(), strict=True
            )
        ]

    @staticmethod
    def _reason(ids: Sequence[int], frames: int) -> str | None:
        if not ids:
            return "empty"
        return "too_long" if min_ctc_frames(ids) > frames else None
