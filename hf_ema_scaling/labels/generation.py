"""What generating labelers share: decoding by the teacher, the end of a label, how likely the teacher finds it.

Labels are decoded by `GenerationMixin.generate` itself, not by what a family has put around it (Whisper's segments and
temperature fallbacks): one pass over each row, with the KV cache, whatever the model's configuration says of it.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_ema_scaling.ema import EMATeacher
from hf_ema_scaling.labels.base import PseudoLabel
from hf_ema_scaling.labels.decoder import bare
from hf_ema_scaling.labels.score_filters import ENDED, LOG_PROBABILITY


@dataclass(frozen=True, slots=True)
class Decoding:
    """How the teacher decodes its labels.

    What else the model's `generation_config` asks for is respected (suppressed tokens, repetition penalties, minimal
    lengths), except a forced end of sequence: a label that was cut off must be known as such.

    Raises:
        ValueError: for values outside their range, or sampling together with beams.
    """

    max_new_tokens: int
    """Tokens after which a label without an end is given up (reason "no_eos")."""
    num_beams: int = 1
    """1 for the likeliest token at each step, more for beam search."""
    temperature: float = 0.0
    """0 for no sampling; above it, tokens are drawn from the distribution at this temperature."""
    top_k: int = 0
    """Draw among so many likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability."""
    seed: int = 0
    """Of the draws, together with each row's position."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.num_beams < 1:
            raise ValueError(f"num_beams must be at least 1, got {self.num_beams}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be a number of at least 0, got {self.temperature}")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"top_k must be at least 0 and top_p in (0, 1], got {self.top_k} and {self.top_p}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ValueError("top_k and top_p are for sampling: set a temperature above 0")
        if self.temperature > 0 and self.num_beams > 1:
            raise ValueError(
                f"temperature={self.temperature} samples and num_beams={self.num_beams} searches: choose one of them"
            )


class GumbelNoise(LogitsProcessor):
    """Makes the argmax of each step a draw from the softmax of the scores (Gumbel-max trick).

    Each row has a random generator of its own, seeded by (seed, position), so that a draw depends on these, on the
    step and on the row's scores: not on other rows, batches, processes, the device or the global random state, which
    is left alone. Sampling by `generate(do_sample=True)` depends on all of them.

    Args:
        seed: of the run, at least 0.
        positions: one for each row, at least 0.
    """

    def __init__(self, seed: int, positions: Sequence[int]) -> None:
        self._generators = [np.random.default_rng([seed, position]) for position in positions]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores `(rows, vocabulary)` plus standard Gumbel noise, float32."""
        noise = np.stack([generator.gumbel(size=scores.shape[-1]) for generator in self._generators])
        return scores.float() + torch.from_numpy(noise).to(scores.device, torch.float32)


def call(teacher: Callable[..., Any], function: Callable[..., Any], **inputs: Any) -> Any:
    """`function(model, **inputs)` without gradients, as the teacher's forward would be called.

    Args:
        teacher: an `EMATeacher`, or a model in eval mode, possibly wrapped.
        function: takes the model without wrappers and adapters.
        **inputs: its other arguments.

    Raises:
        RuntimeError: when the teacher is in train mode.
    """
    if isinstance(teacher, EMATeacher):
        return teacher.apply(lambda module, **given: function(bare(module), **given), **inputs)
    if getattr(teacher, "training", False):
        raise RuntimeError("the teacher is in train mode, so its labels are random: call teacher.eval() first")
    with torch.no_grad():
        return function(bare(teacher), **inputs)


def generated(
    teacher: Callable[..., Any], decoding: Decoding, eos_ids: Sequence[int], positions: Sequence[int], **inputs: Any
) -> Tensor:
    """The sequences that a teacher generates, int64 `(rows, tokens)`, what they began with included.

    Args:
        teacher: as for `call`.
        decoding: how.
        eos_ids: ids that end a sequence.
        positions: what the draws of each row are seeded by, beside `decoding.seed`.
        **inputs: of `generate`.
    """
    processors = LogitsProcessorList()
    if decoding.temperature > 0:
        processors.append(TemperatureLogitsWarper(decoding.temperature))
        if decoding.top_k:
            processors.append(TopKLogitsWarper(decoding.top_k))
        if decoding.top_p < 1:
            processors.append(TopPLogitsWarper(decoding.top_p))
        processors.append(GumbelNoise(decoding.seed, positions))

    def generate(model: Any, **given: Any) -> Tensor:
        config = _generation_config(model, decoding, eos_ids)
        with _configured(model, config):
            return GenerationMixin.generate(model, generation_config=config, logits_processor=processors, **given)

    return call(teacher, generate, **inputs)


def _generation_config(model: Any, decoding: Decoding, eos_ids: Sequence[int]) -> GenerationConfig:
    config = copy.deepcopy(model.generation_config)
    padding = getattr(config, "pad_token_id", None)
    values: dict[str, Any] = {
        "max_new_tokens": decoding.max_new_tokens,
        "max_length": None,
        "num_beams": decoding.num_beams,
        "num_return_sequences": 1,
        "do_sample": False,
        "use_cache": True,
        "eos_token_id": list(eos_ids),
        # Only ever behind the end of a sequence, where nobody looks.
        "pad_token_id": eos_ids[0] if padding is None else padding,
        # What is to come first is part of the prompt; an end that is forced would hide that a label was cut off.
        "forced_bos_token_id": None,
        "forced_eos_token_id": None,
        "return_dict_in_generate": False,
        "output_scores": False,
        "output_logits": False,
        "output_attentions": False,
        "output_hidden_states": False,
    }
    values |= dict.fromkeys(
        ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "cache_implementation")
    )
    for name, value in values.items():
        setattr(config, name, value)
    return config


@contextlib.contextmanager
def _configured(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Inside, the model's own configuration is `config`: generation fills from it what `config` leaves open."""
    before = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = before


def until_end(tokens: Sequence[int], eos_ids: Collection[int]) -> tuple[tuple[int, ...], bool]:
    """Tokens up to the first that ends a sequence, with it, and whether there is one."""
    for place, token in enumerate(tokens):
        if token in eos_ids:
            return tuple(tokens[: place + 1]), True
    return tuple(tokens), False


def token_log_probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    """log p of each target token, float32 `(rows, tokens)`; 0 where the target is -100.

    Args:
        logits: `(rows, tokens, vocabulary)`, any float dtype.
        targets: int64 `(rows, tokens)`.

    Raises:
        ValueError: when one of them is NaN.
    """
    scores = logits.float()
    chosen = scores.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    result = (chosen - scores.logsumexp(-1)).masked_fill(targets < 0, 0.0)
    broken = torch.isnan(result).any(-1).nonzero().flatten().tolist()
    if broken:
        raise ValueError(f"the teacher's logits are NaN in rows {broken} of the batch: it has diverged")
    return result


def mean_log_probabilities(logits: Tensor, targets: Tensor) -> list[float]:
    """Mean of log p over the target tokens of each row, in float64; -inf for a row without any."""
    totals = token_log_probabilities(logits, targets).double().sum(-1)
    counts = (targets >= 0).sum(-1)
    return [
        total / count if count else -math.inf for total, count in zip(totals.tolist(), counts.tolist(), strict=True)
    ]


def generated_label(
    target: Sequence[int],
    *,
    text: Sequence[int],
    ended: bool,
    strange: bool = False,
    room: int | None,
    log_probability: float,
    scores: Mapping[str, float],
) -> PseudoLabel:
    """The label of one row; its confidence is the geometric mean of the probabilities of what was generated.

    Args:
        target: what the student is to learn, with forced tokens and end.
        text: its part that is text.
        ended: whether the teacher ended the sequence.
        strange: whether it wrote special tokens into the text.
        room: tokens that the student has for the target; None for no limit.
        log_probability: mean over the tokens that the teacher chose.
        scores: others beside it.
    """
    reason = None
    if not ended:
        reason = "no_eos"
    elif not text:
        reason = "empty"
    elif strange:
        reason = "special_tokens"
    elif room is not None and len(target) > room:
        reason = "too_long"
    confidence = min(math.exp(log_probability), 1.0)
    return PseudoLabel(
        tuple(target), confidence, reason, scores={LOG_PROBABILITY: log_probability, ENDED: float(ended), **scores}
    )


def padded(rows: Sequence[Sequence[int]], value: int, device: torch.device | str | None = None) -> Tensor:
    """Rows as an int64 tensor `(rows, longest)`, filled with `value` on the right (at least one column)."""
    result = torch.full((len(rows), max([1, *map(len, rows)])), value, dtype=torch.long)
    for line, row in zip(result, rows, strict=True):
        line[: len(row)] = torch.tensor(row, dtype=torch.long)
    return result.to(device)
