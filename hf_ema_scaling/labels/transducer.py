"""Greedy labels of transducers: RNN-T (Graves 2012, arXiv 1211.3711) and TDT (Xu et al. 2023, arXiv 2304.06795)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderModelOutput

from hf_ema_scaling.labels.base import CONFIDENCE, LabelKind, PseudoLabel
from hf_ema_scaling.labels.ctc import ctc_frame_lengths
from hf_ema_scaling.labels.decoder import decoder_inputs
from hf_ema_scaling.labels.generation import call, padded

SPEECH_INPUTS = ("input_features", "attention_mask")


class TransducerLabeler:
    """Greedy labels of `ParakeetForRNNT` and `ParakeetForTDT` with a confidence.

    At each place of the lattice the most likely token is taken. The blank moves on by a frame (RNN-T), or any token by
    the most likely of the model's durations (TDT; a blank by one at least). After `max_symbols_per_step` tokens at one
    frame it is left by force. This is what `generate` of transformers does, but a row ends at its own last frame, the
    blank and the special ids are taken out, and the probabilities are kept.

    The confidence is the geometric mean over all decisions of the probability of the token taken, blanks included. A
    row without frames has confidence 0. Reason: "empty" when no token is left.

    Args:
        blank_id: id of the blank (`config.blank_token_id`).
        special_ids: ids that are never a target, see `non_target_ids`.
    """

    kind = LabelKind.TOKENS
    score_names = frozenset({CONFIDENCE})

    def __init__(self, blank_id: int, special_ids: Collection[int] = ()) -> None:
        self.blank_id = blank_id
        self.special_ids = frozenset(special_ids) | {blank_id}

    def label(self, teacher: Callable[..., Any], batch: Mapping[str, Tensor]) -> list[PseudoLabel]:
        """Run the teacher on the speech of `batch`, and on nothing else in it, and label each row.

        Args:
            teacher: a transducer in eval mode, possibly wrapped, or an `EMATeacher`.
            batch: `input_features` (rows, frames, bins), padded on the right, and `attention_mask` if rows are padded.

        Raises:
            RuntimeError: when the teacher is in train mode.
            ValueError: when logits are NaN.
        """
        inputs = {name: batch[name] for name in SPEECH_INPUTS if name in batch}
        tokens, scores, taken = call(teacher, self._labelled, **inputs)
        labels = []
        for ids, logs, steps in zip(tokens.tolist(), scores.tolist(), taken.tolist(), strict=True):
            kept = tuple(token for token in ids[:steps] if token not in self.special_ids)
            confidence = min(1.0, float(torch.tensor(logs[:steps]).double().mean().exp())) if steps else 0.0
            labels.append(PseudoLabel(kept, confidence, None if kept else "empty"))
        return labels

    def with_targets(self, inputs: Mapping[str, Tensor], labels: Sequence[PseudoLabel]) -> dict[str, Tensor]:
        """The inputs with `labels`, padded with -100, and the `decoder_input_ids` that go with them."""
        rows = [label.ids if label.kept else () for label in labels]
        targets = padded(rows, -100, inputs["input_features"].device)
        return {**inputs, "labels": targets, "decoder_input_ids": decoder_inputs(targets, self.blank_id)}

    def _labelled(self, model: Any, **inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        encoded = model.get_audio_features(**inputs).pooler_output
        return self._decode(model, encoded, ctc_frame_lengths(model, inputs).to(encoded.device))

    def _decode(self, model: Any, encoded: Tensor, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and their log-probabilities (rows, decisions), and the number of decisions of each row."""
        rows = len(encoded)
        durations = getattr(model.config, "durations", None)
        size, most = model.config.vocab_size, int(model.config.max_symbols_per_step)
        place, here, taken = (torch.zeros(rows, dtype=torch.long, device=encoded.device) for _ in range(3))
        token = torch.full_like(place, self.blank_id)
        cache, tokens, scores = None, [], []
        while bool((active := place < frames).any()):
            frame = encoded[torch.arange(rows, device=encoded.device), place.clamp(max=encoded.shape[1] - 1), None]
            # The decoder keeps its state where it is given a blank: so do rows that are done.
            output = model(
                decoder_input_ids=token[:, None],
                decoder_cache=cache,
                use_decoder_cache=True,
                encoder_outputs=ParakeetEncoderModelOutput(pooler_output=frame),
            )
            cache = output.decoder_cache
            logits = output.logits.flatten(1, -2).view(rows, -1).float()
            best = logits[:, :size].log_softmax(-1).max(-1)
            if bool(best.values[active].isnan().any()):
                raise ValueError("the teacher's logits are NaN: it has diverged")
            token = best.indices.masked_fill(~active, self.blank_id)
            blank = token == self.blank_id
            if durations is None:
                step = blank.long()
            else:
                step = torch.tensor(durations, device=encoded.device)[logits[:, size:].argmax(-1)]
                step = torch.where(blank, step.clamp(min=1), step)
            here = torch.where(step > 0, torch.zeros_like(here), here + 1)
            forced = here >= most
            step, here = torch.where(forced, torch.ones_like(step), step), here.masked_fill(forced, 0)
            place = torch.where(active, place + step, place)
            taken += active
            tokens.append(token)
            scores.append(best.values)
        if not tokens:
            nothing = torch.zeros(rows, 0)
            return nothing.long(), nothing, taken
        return torch.stack(tokens, 1), torch.stack(scores, 1), taken
