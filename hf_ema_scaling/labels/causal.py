"""Labels of causal language models: the teacher continues each prompt, and the student learns the continuation."""

from __future__ import annotations

import dataclasses
import math
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
from hf_ema_scaling.labels.score_filters import ENDED, LOG_PROBABILITY


@dataclass(frozen=True)
class CausalLMLabeler:
    """Labels prompts with the continuation that a causal language model generates, its end included.

    Rows may be padded on either side and differ in length; the teacher gets them padded on the left. The confidence is
    `exp(scores["log_probability"])`, the geometric mean of the teacher's own probabilities (no penalties, no
    suppressed tokens) of the tokens of the continuation, the end included.

    Reasons: "no_eos" when the teacher did not come to an end, "empty" when there is no text, "too_long" when prompt
    and label together are longer than `max_target_tokens`, or the prompt leaves no room for `max_new_tokens` in the
    teacher's positions and so is not continued at all.

    Args:
        eos_ids: ids that end a label.
        decoding: how to decode.
        max_positions: tokens that the teacher can read; None for no limit.
        max_target_tokens: room of the student for prompt and label together; None for no limit of its own.
        special_ids: ids that are no text.
        positions: what the draws of each row are seeded by; the row's number in the batch where there are none.
    """

    eos_ids: tuple[int, ...]
    decoding: Decoding
    max_positions: int | None = None
    max_target_tokens: int | None = None
    special_ids: frozenset[int] = frozenset()
    positions: tuple[int, ...] | None = None

    kind = LabelKind.TOKENS
    score_names = frozenset({CONFIDENCE, LOG_PROBABILITY, ENDED})

    @property
    def samples(self) -> bool:
        """Whether labels are drawn."""
        return self.decoding.temperature > 0

    def at(self, positions: Sequence[int]) -> CausalLMLabeler:
        """The labeler for a batch whose rows have these positions in the stream."""
        return dataclasses.replace(self, positions=tuple(positions))

    def label(self, teacher: Callable[..., Any], batch: Mapping[str, Tensor]) -> list[PseudoLabel]:
        """Let the teacher continue each prompt of `batch`, and look at nothing else in it.

        Args:
            teacher: an `EMATeacher`, or a causal language model in eval mode.
            batch: `input_ids` (rows, tokens), and where rows differ in length `attention_mask`.

        Raises:
            ValueError: when the batch holds no `input_ids`, a prompt is empty, or the teacher's logits are NaN.
            RuntimeError: when the teacher is in train mode.
        """
        prompts = prompts_of(batch)
        positions = range(len(prompts)) if self.positions is None else self.positions
        if len(positions) != len(prompts):
            raise ValueError(f"there are {len(positions)} positions for {len(prompts)} rows")
        room = math.inf if self.max_positions is None else self.max_positions - self.decoding.max_new_tokens
        rows = [row for row, prompt in enumerate(prompts) if len(prompt) <= room]
        labels = [PseudoLabel((), 0.0, "too_long") for _ in prompts]
        if rows:
            chosen, device = [prompts[row] for row in rows], batch["input_ids"].device
            found = self._label(teacher, chosen, [positions[row] for row in rows], device)
            for row, label in zip(rows, found, strict=True):
                labels[row] = label
        return labels

    def _label(
        self,
        teacher: Callable[..., Any],
        prompts: Sequence[Sequence[int]],
        positions: Sequence[int],
        device: torch.device,
    ) -> list[PseudoLabel]:
        filler = self.eos_ids[0]
        reversed_rows = [list(reversed(prompt)) for prompt in prompts]
        left = padded(reversed_rows, filler, device).flip(1)
        mask = padded([[1] * len(prompt) for prompt in prompts], 0, device)
        sequences = generated(
            teacher, self.decoding, self.eos_ids, positions, input_ids=left, attention_mask=mask.flip(1)
        )
        ends = [until_end(tokens, self.eos_ids) for tokens in sequences[:, left.shape[1] :].tolist()]
        whole = [[*prompt, *tokens] for prompt, (tokens, _) in zip(prompts, ends, strict=True)]
        ones = padded([[1] * len(row) for row in whole], 0, device)
        logits = call(
            teacher,
            lambda model, **inputs: model(**inputs),
            input_ids=padded(whole, filler, device),
            attention_mask=ones,
        ).logits
        targets = padded(
            [[-100] * len(prompt) + list(tokens) for prompt, (tokens, _) in zip(prompts, ends, strict=True)],
            -100,
            device,
        )
        likelihoods = mean_log_probabilities(logits[:, :-1], targets[:, 1:])
        return [
            generated_label(
                tokens,
                text=[token for token in tokens if token not in self.special_ids and token not in self.eos_ids],
                ended=ended,
                room=None if self.max_target_tokens is None else self.max_target_tokens - len(prompt),
                log_probability=likelihood,
                scores={},
            )
            for prompt, (tokens, ended), likelihood in zip(prompts, ends, likelihoods, strict=True)
        ]

    def as_unlabelled(self, inputs: Mapping[str, Tensor], labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Prompts without their completions, and these: the teacher must not see what it is to say.

        A prompt is what comes before the first token with a label, at least one token, as nothing predicts the first.
        Of rows with several turns the first completion counts. A row without labels is all prompt.

        Args:
            inputs: `input_ids` and where rows differ in length `attention_mask`.
            labels: int64 `(rows, tokens)`, -100 on prompts and padding.

        Raises:
            ValueError: as `prompts_of`.
        """
        prompts, completions = [], []
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        targets_of = [row[kept].tolist() for row, kept in zip(labels, mask, strict=True)]
        for ids, targets in zip(prompts_of(inputs), targets_of, strict=True):
            start = next((place for place, target in enumerate(targets) if place and target >= 0), len(ids))
            end = next((place for place in range(start, len(ids)) if targets[place] < 0), len(ids))
            prompts.append(ids[:start])
            completions.append(targets[start:end])
        device = labels.device
        found = {
            "input_ids": padded(prompts, self.eos_ids[0], device),
            "attention_mask": padded([[1] * len(prompt) for prompt in prompts], 0, device),
        }
        return found, padded(completions, -100, device)

    def with_targets(self, inputs: Mapping[str, Tensor], labels: Sequence[PseudoLabel]) -> dict[str, Tensor]:
        """The student's inputs: prompt and label one after the other, padded on the right, the prompt masked.

        Args:
            inputs: prompts, as for `label`.
            labels: one per row.

        Returns:
            `input_ids`, `attention_mask` and `labels`, int64 `(rows, tokens)`; labels are -100 on prompts and padding,
            and everywhere in rows whose label was dropped.

        Raises:
            ValueError: for inputs beside those two, which would no longer fit the longer rows.
        """
        strange = sorted(set(inputs) - {"input_ids", "attention_mask"})
        if strange:
            raise ValueError(
                f"the rows to label hold {', '.join(strange)} beside input_ids and attention_mask, and nobody knows "
                "how that goes on behind the prompt: leave it out of the data collator's output"
            )
        prompts, device = prompts_of(inputs), inputs["input_ids"].device
        tokens = [label.ids if label.kept else () for label in labels]
        whole = [[*prompt, *row] for prompt, row in zip(prompts, tokens, strict=True)]
        masked = [[-100] * len(prompt) + list(row) for prompt, row in zip(prompts, tokens, strict=True)]
        return {
            "input_ids": padded(whole, self.eos_ids[0], device),
            "attention_mask": padded([[1] * len(row) for row in whole], 0, device),
            "labels": padded(masked, -100, device),
        }


def prompts_of(batch: Mapping[str, Tensor]) -> list[list[int]]:
    """The tokens of each row without padding.

    Args:
        batch: `input_ids` and where rows differ in length `attention_mask`, `(rows, tokens)`, padded on either side.

    Raises:
        ValueError: without `input_ids`, or for a row without tokens.
    """
    if "input_ids" not in batch:
        raise ValueError(f"prompts to continue need 'input_ids', got {sorted(batch)}")
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
    prompts = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
    empty = [row for row, prompt in enumerate(prompts) if not prompt]
    if empty:
        raise ValueError(f"the prompts in rows {empty} of the batch are empty: give each at least one token (bos)")
    return prompts
