"""Known texts become what the teacher's labels are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_generation
import tiny_whisper
from transformers import AutoProcessor

from hf_ema_scaling.data.targets import TextTargets
from hf_ema_scaling.labels import generative_labeler_for


class Letters:
    """A tokenizer without files: one id per letter, other ids for targets than for sources."""

    all_special_ids = (0, 2, 7)
    unk_token_id = 7

    def __call__(self, text: str | None = None, *, text_target: str | None = None, add_special_tokens: bool) -> Any:
        assert text is None and text_target is not None and not add_special_tokens
        ids = {"<": 2, "?": 7, " ": 20}
        return type("Encoded", (), {"input_ids": [ids.get(letter, ord(letter) - 87) for letter in text_target]})

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"<{i}>" for i in ids]

    def convert_tokens_to_ids(self, token: str) -> int:
        return {"fr": 6}.get(token, 7)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("t5", [], [1]),
        ("bart", [0], [2]),
        ("mbart-50", [5], [2]),
        ("mbart-25", [], [2, 5]),
        ("m2m100", [5], [2]),
        ("moonshine", [], [2]),
        ("whisper-english", [9], [2]),
        ("whisper", [5, 6, 9], [2]),
        ("seamless", [6], [3]),
    ],
)
def test_a_text_is_surrounded_as_each_family_has_it(name: str, before: list[int], after: list[int]) -> None:
    head = tiny_generation.HEADS[name]
    labeler: Any = generative_labeler_for(head.make(0), max_new_tokens=9, **head.options)
    targets = TextTargets(labeler, Letters())
    assert targets("  cab\n?") == [*before, 12, 10, 11, 20, 7, *after]
    assert targets(" \n") == []
    assert TextTargets(labeler, Letters(), leading_space=True)("b") == [*before, 20, 11, *after]


def test_marks_in_texts_and_unknown_languages_are_refused() -> None:
    bart: Any = generative_labeler_for(tiny_generation.bart())
    with pytest.raises(ValueError, match=r"text 'a<' holds \['<2>'\], which are special tokens and no text"):
        TextTargets(bart, Letters())("a<")
    anything: Any = generative_labeler_for(tiny_generation.whisper())
    with pytest.raises(ValueError, match="writes many languages: set language"):
        TextTargets(anything, Letters())


def test_whispers_own_tokenizer_reads_the_text_back(tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(tiny_whisper.save(tmp_path))
    model = tiny_generation.whisper()
    model.generation_config.no_timestamps_token_id = 23
    labeler: Any = generative_labeler_for(model, processor, language="en")
    ids = TextTargets(labeler, processor.tokenizer, leading_space=True)("ab c")
    assert ids == [4, 6, 23, 10, 11, 12, 10, 13, 2]
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == " ab c"
