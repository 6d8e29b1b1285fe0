"""Corrupt inputs: each is an error that names its item, or is skipped and counted, as configured; and none hangs.

Every case is the second of three items, so that an error must find it, and what is left must be the two others.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from corrupt import (
    ARRAYS,
    FILES,
    GOOD,
    LINES,
    MANIFESTS,
    PAIRS,
    SAVED,
    TEXTS,
    WORDS,
    Fine,
    Raised,
    array,
    columns,
    judged,
    nothing_hangs,
    tone,
    wav,
)
from datasets import ClassLabel, Dataset, Value
from transformers import PreTrainedTokenizerFast, Wav2Vec2FeatureExtractor

from hf_ema_scaling.data.audio import AudioError, read_audio
from hf_ema_scaling.data.bad_items import BadItemError
from hf_ema_scaling.data.collator import TwoSourceDataset
from hf_ema_scaling.data.sampler import Draw
from hf_ema_scaling.data.speech import build_character_processor
from hf_ema_scaling.data.speech_rows import prepare_ctc, prepare_row
from hf_ema_scaling.data.stream import LABELLED, UNLABELLED
from hf_ema_scaling.data.targets import TextTargets
from hf_ema_scaling.data.text import build_word_tokenizer, prepare_classification
from hf_ema_scaling.data.tokens import prepare_tokens
from hf_ema_scaling.data.translation import build_subword_tokenizer, prepare_pairs
from hf_ema_scaling.labels import Decoding, Seq2SeqLabeler
from hf_ema_scaling.recipe import load_speech, load_text
from hf_ema_scaling.recipe.sources import load_pairs, load_words

__all__ = ["nothing_hangs"]  # a fixture of every test here

SPEECH = build_character_processor("abc<pad>", num_mel_bins=16)
TEXT: PreTrainedTokenizerFast = build_word_tokenizer(["a good film"])
SUBWORDS = build_subword_tokenizer(["ab"], vocabulary_size=300)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def prepared(source: Path, choice: str) -> Dataset:
    loaded = load_speech(str(source), on_bad_item=choice)
    return prepare_ctc(loaded, SPEECH, max_seconds=30.0, on_bad_item=choice)


@pytest.mark.parametrize("case", FILES)
def test_files(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content, outcome = FILES[case]
    assert content is not None
    for name in ("good.wav", "also.wav"):
        (tmp_path / name).write_bytes(wav())
    (tmp_path / "bad.wav").write_bytes(content)
    lines = [json.dumps({"audio": name, "text": "ab"}) for name in ("good.wav", "bad.wav", "also.wav")]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    judged(lambda choice: prepared(tmp_path / "list.jsonl", choice), outcome, caplog, AudioError)
    if isinstance(outcome, Fine):
        rows = prepared(tmp_path / "list.jsonl", "raise")
        assert len(rows[1]["input_features"]) == pytest.approx(
            len(rows[0]["input_features"]) * (1, 2)[case == "8 kHz"], abs=3
        )
        assert np.isfinite(rows[1]["input_features"]).all()


@pytest.mark.parametrize("case", LINES)
def test_lines_of_a_manifest(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    line, outcome = LINES[case]
    (tmp_path / "good.wav").write_bytes(wav())
    content = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "list.jsonl").write_bytes(b"\n".join([GOOD.encode(), content, GOOD.encode()]))
    errors = (BadItemError, FileNotFoundError)
    judged(lambda choice: prepared(tmp_path / "list.jsonl", choice), outcome, caplog, errors)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name, content, outcome = MANIFESTS[case]
    (tmp_path / "good.wav").write_bytes(wav())
    (tmp_path / name).write_bytes(content)
    source = tmp_path if name == "metadata.csv" else tmp_path / name
    judged(lambda choice: prepared(source, choice), outcome, caplog, ValueError)


@pytest.mark.parametrize("case", ARRAYS)
def test_rows_of_audio(case: str) -> None:
    source, reason, message = ARRAYS[case]
    with pytest.raises(AudioError, match=message) as caught:
        read_audio(source)
    assert caught.value.reason == reason
    options: dict[str, Any] = {"bad_texts": {}, "seconds": (0.0, 30.0), "missing": np.zeros((0, 16), np.float32)}
    row = {"audio": source}, 1, SPEECH.feature_extractor, "audio"
    with pytest.raises(AudioError, match=f"row 2: .*{message}"):
        prepare_row(*row, **options, on_bad_item="raise")
    skipped = prepare_row(*row, **options, on_bad_item="skip")
    assert (
        skipped["dropped"] == reason and skipped["why"].startswith("row 2: ") and len(skipped["input_features"]) == 0
    )


@pytest.mark.parametrize("case", SAVED)
@pytest.mark.parametrize("processes", [None, 2])
def test_saved_data_sets(case: str, processes: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    features, bad, outcome = SAVED[case]
    good = {"audio": array(tone().tolist()), "text": "ab"}
    columns(features, good, bad).save_to_disk(tmp_path / "saved")

    def run(choice: str) -> Dataset:
        loaded = load_speech(str(tmp_path / "saved"), on_bad_item=choice)
        return prepare_ctc(loaded, SPEECH, on_bad_item=choice, num_proc=processes)

    judged(run, outcome, caplog, BadItemError)


def classified(source: Path, choice: str) -> Dataset:
    loaded = load_text(str(source), on_bad_item=choice)
    options: dict[str, Any] = {"text_column": "text", "label_column": "label", "max_length": 16}
    return prepare_classification(loaded, TEXT, {"neg": 0, "pos": 1}, on_bad_item=choice, **options)


@pytest.mark.parametrize("case", TEXTS)
def test_texts(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    line, outcome = TEXTS[case]
    good = '{"text": "a good film", "label": "pos"}'
    (tmp_path / "list.jsonl").write_text(f"{good}\n{line}\n{good}\n", encoding="utf-8")
    judged(lambda choice: classified(tmp_path / "list.jsonl", choice), outcome, caplog, BadItemError)


@pytest.mark.parametrize("case", WORDS)
def test_words(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    line, outcome = WORDS[case]
    good = '{"tokens": ["a", "film"], "ner_tags": ["O", "B-x"]}'
    (tmp_path / "list.jsonl").write_text(f"{good}\n{line}\n{good}\n", encoding="utf-8")

    def run(choice: str) -> Dataset:
        loaded = load_words(str(tmp_path / "list.jsonl"), on_bad_item=choice)
        options: dict[str, Any] = {"word_column": "tokens", "tag_column": "ner_tags", "max_length": 16}
        return prepare_tokens(loaded, TEXT, {"O": 0, "B-x": 1}, **options)

    judged(run, outcome, caplog, BadItemError)


@pytest.mark.parametrize("case", PAIRS)
def test_pairs(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    line, outcome = PAIRS[case]
    good = '{"source": "a", "target": "b"}'
    (tmp_path / "list.jsonl").write_text(f"{good}\n{line}\n{good}\n", encoding="utf-8")
    labeler = Seq2SeqLabeler(prompt=(1,), eos_ids=(2,), decoding=Decoding(9), special_ids=frozenset({0, 1, 2}))

    def run(choice: str) -> Dataset:
        loaded = load_pairs(str(tmp_path / "list.jsonl"), on_bad_item=choice)
        options: dict[str, Any] = {"source_column": "source", "target_column": "target", "max_length": 16}
        return prepare_pairs(loaded, SUBWORDS, TextTargets(labeler, SUBWORDS), on_bad_item=choice, **options)

    judged(run, outcome, caplog, BadItemError)


def test_what_takes_too_long_is_ended() -> None:
    """Both clocks of this test run, and their signals end it."""
    for number, message in ((signal.SIGPROF, "not done after 20 s"), (signal.SIGALRM, "waiting for 120 s")):
        with pytest.raises(TimeoutError, match=message):
            signal.raise_signal(number)
    # The clocks of the system are a few milliseconds coarse.
    assert 0 < signal.getitimer(signal.ITIMER_PROF)[0] < 20.1 and 0 < signal.getitimer(signal.ITIMER_REAL)[0] < 120.1


@pytest.mark.parametrize("label", [-1, None])
def test_hidden_labels_of_the_hub(label: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    features = {"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])}
    good = {"text": "a good film", "label": 1}
    columns(features, good, {**good, "label": label}).save_to_disk(tmp_path / "saved")
    told = "row 2: the label is " + ("-1, which names none of neg, pos" if label is not None else "null or empty")
    outcome = Raised("bad_label" if label is not None else "no_label", told)
    judged(lambda choice: classified(tmp_path / "saved", choice), outcome, caplog, BadItemError)


@pytest.mark.parametrize("choice", ["raise", "skip"])
def test_nothing_left_is_an_error(choice: str, tmp_path: Path) -> None:
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    (tmp_path / "list.jsonl").write_text('{"audio": "bad.wav", "text": "ab"}\n')
    with pytest.raises(ValueError, match=r"bad.wav: not readable"):
        prepared(tmp_path / "list.jsonl", choice)
    (tmp_path / "texts.jsonl").write_text('{"text": "", "label": "pos"}\n')
    with pytest.raises(ValueError, match=r"texts.jsonl, row 1: text is empty"):
        classified(tmp_path / "texts.jsonl", choice)


def test_paths_may_lead_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "good.wav").write_bytes(wav())
    lines = [json.dumps({"audio": path, "text": "ab"}) for path in ("../good.wav", str(tmp_path / "good.wav"))]
    (tmp_path / "here" / "list.jsonl").write_text("\n".join(lines))
    assert len(prepared(tmp_path / "here" / "list.jsonl", "raise")) == 2
    os.symlink(tmp_path / "here" / "loop.wav", tmp_path / "here" / "loop.wav")
    (tmp_path / "here" / "list.jsonl").write_text('{"audio": "loop.wav", "text": "ab"}')
    with pytest.raises(FileNotFoundError, match=r"loop.wav"):
        prepared(tmp_path / "here" / "list.jsonl", "raise")


def extractor_name(processor: Any) -> str:
    name: str = getattr(processor, "feature_extractor", processor).model_input_names[0]
    return name


@pytest.mark.parametrize("extractor", [SPEECH, Wav2Vec2FeatureExtractor()])
def test_labels_of_unlabelled_rows_are_hidden(extractor: Any) -> None:
    row = {"audio": array(tone().tolist()), "text": "ab", "labels": [3, 4], "label": 1, "label_ids": [3]}
    data = Dataset.from_list([row, row])
    assert not {"labels", "label", "label_ids", "text"} & {
        *prepare_ctc(data, extractor, text_column=None).column_names
    }
    both = TwoSourceDataset(data, data)
    draws = [Draw(source=source, index=0, position=0, micro_batch=0, weight=1.0) for source in (LABELLED, UNLABELLED)]
    (_, seen), (_, unseen) = both.__getitems__(draws)
    assert seen["labels"] == [3, 4]
    assert sorted(unseen) == ["audio", "text"]


def test_the_list_is_long_enough() -> None:
    def corrupt(*lists: dict[str, Any]) -> int:
        return sum(not isinstance(case[-1], Fine) for cases in lists for case in cases.values())

    audio, text = corrupt(FILES, LINES, MANIFESTS, SAVED) + len(ARRAYS), corrupt(TEXTS, WORDS, PAIRS)
    assert audio >= 80 and text >= 30, (audio, text)
