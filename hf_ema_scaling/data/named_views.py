"""Views of an input by their names, as recipes write them: for the student, and for a second label of the teacher."""

from __future__ import annotations

import difflib
import inspect
import json
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_ema_scaling.data.speech import SpecAugment
from hf_ema_scaling.data.speech_rows import window_frames
from hf_ema_scaling.data.speech_views import SPEECH_INPUTS, AdditiveNoise, SpeedPerturbation
from hf_ema_scaling.data.text_views import TokenMasking, WordDropout
from hf_ema_scaling.data.views import Augmentation, Chain, changes_length
from hf_ema_scaling.labels.base import Labeler, columns_of
from hf_ema_scaling.labels.tokens import WORD_IDS
from hf_ema_scaling.labels.two_views import two_views

CONTENT = (*SPEECH_INPUTS, "input_ids")


def token_masking(tokenizer: Any, share: float) -> Augmentation:
    """`TokenMasking` by the tokenizer's mask token."""
    return TokenMasking.from_tokenizer(tokenizer, share)


def word_dropout(tokenizer: Any, share: float) -> Augmentation:
    """`WordDropout` by the tokenizer's words."""
    return WordDropout.from_tokenizer(tokenizer, share)


def speed(extractor: Any, speeds: Sequence[float] = (0.9, 1.0, 1.1)) -> Augmentation:
    """`SpeedPerturbation`.

    Raises:
        ValueError: for a model that hears a window of fixed length.
    """
    if window_frames(extractor)[0] is not None:
        raise ValueError("the view speed changes how long speech is, and this model hears a window of fixed length")
    return SpeedPerturbation(speeds)


def noise(extractor: Any, probability: float = 0.5, snr: Sequence[float] = (10.0, 30.0)) -> Augmentation:
    """`AdditiveNoise`; `snr` is the lowest and the highest ratio in dB."""
    if len(snr) != 2:
        raise ValueError(f"the view noise: snr must be a lowest and a highest number of dB, got {list(snr)}")
    return AdditiveNoise(probability, (float(snr[0]), float(snr[1])))


def spec_augment(
    extractor: Any,
    freq_masks: int = 2,
    freq_width: int = 15,
    time_masks: int = 2,
    time_width: int = 20,
    time_share: float = 0.2,
) -> Augmentation:
    """`SpecAugment` of log-mel features, by the names of its arguments in recipes.

    Raises:
        ValueError: for a model that reads samples.
    """
    if extractor.model_input_names[0] != "input_features":
        raise ValueError("the view spec_augment masks log-mel features, and this model reads samples: leave it out")
    bins_first = window_frames(extractor)[0] is not None
    return SpecAugment(freq_masks, freq_width, time_masks, time_width, time_share, bins_first=bins_first)


VIEWS_OF_TEXT: dict[str, Callable[..., Augmentation]] = {"token_masking": token_masking, "word_dropout": word_dropout}
VIEWS_OF_SPEECH: dict[str, Callable[..., Augmentation]] = {
    "speed": speed,
    "noise": noise,
    "spec_augment": spec_augment,
}
VIEWS = VIEWS_OF_TEXT | VIEWS_OF_SPEECH
"""Views by their names in recipes: `(tokenizer or feature extractor, **arguments) -> view`."""


def read_views(written: str | Mapping[str, Any], argument: str = "views") -> dict[str, dict[str, Any]]:
    """Views as a recipe writes them: a mapping of names to arguments, or JSON of one; they are applied in its order.

    `{"speed": {"speeds": [0.9, 1.1]}, "noise": null}`; null is for no arguments.

    Args:
        written: the mapping.
        argument: what to call it in messages.

    Raises:
        ValueError: for text that is no JSON mapping, an empty one, a name that is not known (with those that are), an
            argument that the view does not have, or one that is missing.
    """
    written = _parsed(written, argument)
    if not isinstance(written, Mapping) or not written:
        raise ValueError(f"{argument} must be a mapping of names of views to their arguments, got {written!r}")
    views = {str(name): {} if values is None else values for name, values in written.items()}
    for name, values in views.items():
        if name not in VIEWS:
            raise ValueError(
                f"{argument}: no view is called {name!r}{_near(name, VIEWS)}; there are {', '.join(VIEWS)}"
            )
        if not isinstance(values, Mapping):
            raise ValueError(f"{argument}: the arguments of the view {name} must be a mapping, got {values!r}")
        known = list(inspect.signature(VIEWS[name]).parameters.values())[1:]
        for given in values:
            if given not in [parameter.name for parameter in known]:
                names = ", ".join(parameter.name for parameter in known)
                raise ValueError(f"{argument}: the view {name} has no argument {given!r}; it takes {names}")
        missing = [one.name for one in known if one.default is one.empty and one.name not in values]
        if missing:
            raise ValueError(f"{argument}: the view {name} needs {', '.join(missing)}")
    return {name: dict(values) for name, values in views.items()}


def _parsed(written: Any, argument: str) -> Any:
    if not isinstance(written, str):
        return written
    try:
        return json.loads(written)
    except json.JSONDecodeError as error:
        raise ValueError(f"{argument}={written!r} is no JSON ({error}): write views as {{'noise': {{}}}}") from None


def read_second_view(written: str | Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], float | None]:
    """A second view as `read_views` takes it, which may also have `"scale": number`, as `two_views` needs for numbers.

    Returns:
        Views by name, and the scale or None.

    Raises:
        ValueError: as `read_views`; for a scale that is no number above 0.
    """
    written = _parsed(written, "second_view")
    if not isinstance(written, Mapping) or "scale" not in written:
        return read_views(written, "second_view"), None
    scale = written["scale"]
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise ValueError(f"second_view: scale must be a number above 0, got {scale!r}")
    return read_views({name: values for name, values in written.items() if name != "scale"}, "second_view"), scale


def _near(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known))
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


def build_views(written: str | Mapping[str, Any], processing_class: Any, argument: str = "views") -> Augmentation:
    """The views that a recipe writes, one after another.

    Args:
        written: as for `read_views`.
        processing_class: tokenizer, processor or feature extractor of the model.
        argument: what to call `written` in messages.

    Raises:
        ValueError: as `read_views`; for a view of texts where the model hears speech, and the other way round; for
            values out of range, or a processing class without what a view takes (a mask token).
    """
    extractor = getattr(processing_class, "feature_extractor", processing_class)
    hears = next(iter(getattr(extractor, "model_input_names", [])), None) in SPEECH_INPUTS
    known = VIEWS_OF_SPEECH if hears else VIEWS_OF_TEXT
    made = []
    for name, values in read_views(written, argument).items():
        if name not in known:
            raise ValueError(
                f"{argument}: the view {name} is one of {'texts' if hears else 'speech'}, and this model "
                f"{'hears speech' if hears else 'reads texts'}: choose among {', '.join(known)}"
            )
        try:
            made.append(known[name](extractor if hears else processing_class, **values))
        except TypeError as error:
            raise ValueError(f"{argument}: the arguments {values} of the view {name} do not fit: {error}") from error
    return made[0] if len(made) == 1 else Chain(*made)


class FixedView:
    """An augmentation as a view that depends on a row alone: its random numbers are seeded by the row's own content.

    So that a row has the same second view in every batch, on every process and in every run.

    Args:
        augmentation: what changes the rows.
    """

    def __init__(self, augmentation: Augmentation) -> None:
        self.augmentation = augmentation

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs with another view of each row.

        Raises:
            ValueError: without an input that has content, or, where the view changes lengths, without
                `attention_mask` in a batch of several rows.
        """
        name = next((name for name in CONTENT if name in inputs), None)
        if name is None:
            raise ValueError(f"a second view needs one of {', '.join(CONTENT)}, got {sorted(inputs)}")
        values, mask = inputs[name], inputs.get("attention_mask")
        if mask is None and changes_length(self.augmentation) and len(values) > 1:
            raise ValueError(
                f"{type(self.augmentation).__name__} changes lengths, and without attention_mask the model would take "
                "the padding for content: choose another second view"
            )
        seeds = []
        for row in range(len(values)):
            content = values[row] if mask is None else values[row][mask[row].bool()]
            seeds.append(zlib.crc32(content.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data))
        return {**inputs, **self.augmentation(inputs, seeds)}


def with_second_view(labeler: Labeler, written: str | Mapping[str, Any] | None, processing_class: Any) -> Labeler:
    """The labeler, which also says by how much a second view changes its labels (`two_views`); as it is for None.

    Args:
        labeler: makes the labels.
        written: the second view, as for `read_second_view`.
        processing_class: of the model.

    Raises:
        ValueError: as `read_second_view` and `two_views`; for a view that moves words where labels are by word.
    """
    if written is None:
        return labeler
    views, scale = read_second_view(written)
    view = build_views(views, processing_class, "second_view")
    if changes_length(view) and WORD_IDS in columns_of(labeler):
        raise ValueError(
            "second_view: labels are by word, and word_dropout leaves words out: take one that keeps every token in "
            "its place (token_masking)"
        )
    return two_views(labeler, FixedView(view), scale=scale)
