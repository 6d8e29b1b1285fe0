"""Labels of encoder-decoders: what the teacher generates, without what its decoder was started with."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_ema_scaling.labels.base import CONFIDENCE, LabelKind, PseudoLabel
from hf_ema_scaling.labels.generation import (
    Decoding,
    call,
    generated,
    generated_label,
    mean_log_probabilities,
    padded,
    until_end,
)
from hf_ema_scaling.labels.score_filters import ENDED, LOG_PROBABILITY, NO_SPEECH

ENCODER_INPUTS = ("input_ids", "input_features", "input_values")


@dataclass(frozen=True)
class Seq2SeqLabeler:
    """Labels rows of speech or text by generation with an encoder-decoder.

    A label is the student's whole target: forced tokens (language, task), the text, and the end of sequence, but not
    the token with which the decoder starts. Its confidence is `exp(scores["log_probability"])`, the geometric mean of
    the teacher's own probabilities (no penalties, no suppressed tokens) of the tokens it generated, the end included.

    Reasons: "no_eos" when the teacher did not come to an end, "empty" when there is no text,
    "special_tokens" when one of `never_ids` is in it (another language, a mask), "too_long" when the student has no
    room for the target.

    Scores: "log_probability"; for text "length_ratio" (text tokens of the label per text token of the source) and
    "copy" (share of the label's text tokens, counted with multiplicity, that are in the source); with `no_speech_id`
    "no_speech", its probability at the decoder's start; with `languages` "language", the probability of the likeliest
    among them.

    Args:
        prompt: what the decoder begins with: the start token, then what is forced.
        eos_ids: ids that end a label.
        decoding: how to decode.
        suffix: what follows the end in the student's target: mBART's language where it also starts the decoder.
        max_target_tokens: room of the student for a target; None for no limit.
        special_ids: ids that are no text.
        never_ids: ids that no label holds but in the places of `prompt` and `suffix`.
        languages: ids one of which the teacher chooses for each row, in the place after the start token.
        no_speech_id: id whose probability at the decoder's start says that there is no speech (Whisper).
        by_length: rows of unlike lengths are decoded apart, for encoders whose output depends on padding.
        positions: what the draws of each row are seeded by; the row's number in the batch where there are none.
    """

    prompt: tuple[int, ...]
    eos_ids: tuple[int, ...]
    decoding: Decoding
    suffix: tuple[int, ...] = ()
    max_target_tokens: int | None = None
    special_ids: frozenset[int] = frozenset()
    never_ids: frozenset[int] = frozenset()
    languages: tuple[int, ...] = ()
    no_speech_id: int | None = None
    by_length: bool = False
    positions: tuple[int, ...] | None = None

    kind = LabelKind.TOKENS

    @property
    def score_names(self) -> frozenset[str]:
        """Scores of its labels, for any kind of input; "length_ratio" and "copy" are of text alone."""
        names = {CONFIDENCE, LOG_PROBABILITY, ENDED, "length_ratio", "copy"}
        return frozenset(names | ({NO_SPEECH} if self.no_speech_id is not None else set()))

    @property
    def samples(self) -> bool:
        """Whether labels are drawn."""
        return self.decoding.temperature > 0

    def at(self, positions: Sequence[int]) -> Seq2SeqLabeler:
        """The labeler for a batch whose rows have these positions in the stream."""
        return dataclasses.replace(self, positions=tuple(positions))

    def label(self, teacher: Callable[..., Any], batch: Mapping[str, Tensor]) -> list[PseudoLabel]:
        """Let the teacher label the inputs of `batch`, and look at nothing else in it.

        Args:
            teacher: an `EMATeacher`, or an encoder-decoder in eval mode.
            batch: `input_ids` (rows, tokens), `input_values` (rows, samples) or `input_features` (rows, frames, bins;
                Whisper's: rows, bins, frames), padded on the right, and where rows differ in length
                `attention_mask`.

        Raises:
            ValueError: when the batch holds no such input, or the teacher's logits are NaN.
            RuntimeError: when the teacher is in train mode.
        """
        name = next((name for name in ENCODER_INPUTS if name in batch), None)
        if name is None:
            raise ValueError(f"a batch to label needs one of {', '.join(ENCODER_INPUTS)}, got {sorted(batch)}")
        count = len(batch[name])
        positions = range(count) if self.positions is None else self.positions
        if len(positions) != count:
            raise ValueError(f"there are {len(positions)} positions for {count} rows")
        mask = batch.get("attention_mask")
        groups: dict[int, list[int]] = {}
        if self.by_length and mask is not None:
            for row, length in enumerate(mask.sum(-1).tolist()):
                groups.setdefault(length, []).append(row)
        else:
            groups[batch[name].shape[1]] = list(range(count))
        labels: dict[int, PseudoLabel] = {}
        for length, rows in groups.items():
            inputs = {name: batch[name][rows, :length]}
            if mask is not None:
                inputs["attention_mask"] = mask[rows] if not self.by_length else mask[rows, :length]
            labels.update(zip(rows, self._label(teacher, inputs, [positions[row] for row in rows]), strict=True))
        return [labels[row] for row in range(count)]

    def _label(
        self, teacher: Callable[..., Any], inputs: dict[str, Tensor], positions: Sequence[int]
    ) -> list[PseudoLabel]:
        main = next(iter(inputs.values()))
        encoded = call(teacher, _encode, **inputs)
        others = {name: value for name, value in inputs.items() if name == "attention_mask"}
        prompts, languages = self._prompts(teacher, encoded, others, main)
        # Beams repeat the encoder's output in place.
        sequences = generated(
            teacher,
            self.decoding,
            self.eos_ids,
            positions,
            **inputs,
            encoder_outputs=copy.copy(encoded),
            decoder_input_ids=prompts,
        ).tolist()
        begun = len(self.prompt)
        ends = [until_end(sequence[begun:], self.eos_ids) for sequence in sequences]
        whole = [(*prompt, *tokens) for prompt, (tokens, _) in zip(prompts.tolist(), ends, strict=True)]
        logits = call(
            teacher,
            _forward,
            encoder_outputs=encoded,
            decoder_input_ids=padded([row[:-1] for row in whole], self.eos_ids[0], main.device),
            **others,
        ).logits
        # What was forced was not chosen.
        targets = padded([[-100] * (begun - 1) + list(row[begun:]) for row in whole], -100, main.device)
        likelihoods = mean_log_probabilities(logits, targets)
        scores = self._scores(inputs, [tokens for tokens, _ in ends])
        if self.no_speech_id is not None:
            for row, value in zip(
                scores, logits[:, 0].float().softmax(-1)[:, self.no_speech_id].tolist(), strict=True
            ):
                row[NO_SPEECH] = value
        for row, value in zip(scores, languages, strict=False):
            row["language"] = value
        return [
            generated_label(
                (*row[1:], *self.suffix),
                text=self._text(tokens),
                ended=ended,
                strange=not self.never_ids.isdisjoint(tokens),
                room=self.max_target_tokens,
                log_probability=likelihood,
                scores=others,
            )
            for row, (tokens, ended), likelihood, others in zip(whole, ends, likelihoods, scores, strict=True)
        ]

    def _prompts(
        self, teacher: Callable[..., Any], encoded: Any, others: Mapping[str, Tensor], main: Tensor
    ) -> tuple[Tensor, list[float]]:
        """The decoder's prompt of each row, and the probability of its language where the teacher chooses it."""
        prompts = torch.tensor(self.prompt, device=main.device).repeat(len(main), 1)
        if not self.languages:
            return prompts, []
        logits = call(teacher, _forward, encoder_outputs=encoded, decoder_input_ids=prompts[:, :1], **others).logits
        known = torch.tensor(self.languages, device=main.device)
        best = logits[:, 0, known].float().softmax(-1).max(-1)
        prompts[:, 1] = known[best.indices]
        return prompts, best.values.tolist()

    def _text(self, tokens: Sequence[int]) -> list[int]:
        return [token for token in tokens if token not in self.special_ids and token not in self.eos_ids]

    def _scores(self, inputs: Mapping[str, Tensor], labels: Sequence[Sequence[int]]) -> list[dict[str, float]]:
        if "input_ids" not in inputs:
            return [{} for _ in labels]
        ids = inputs["input_ids"]
        kept = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        scores = []
        for row, mask, tokens in zip(ids, kept, labels, strict=True):
            source, text = self._text(row[mask].tolist()), self._text(tokens)
            shared = sum((Counter(source) & Counter(text)).values())
            scores.append({"length_ratio": len(text) / max(1, len(source)), "copy": shared / max(1, len(text))})
        return scores


def _forward(model: Any, **inputs: Any) -> Any:
    return model(**inputs)


def _encode(model: Any, **inputs: Tensor) -> Any:
    """The output of the model's encoder."""
    encoder = model.get_encoder()
    known = inspect.signature(encoder.forward).parameters
    open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())
    return encoder(**{n: v for n, v in inputs.items() if open_ended or n in known}, return_dict=True)
