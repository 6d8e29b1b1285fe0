from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from datasets import DatasetDict

from hf_ema_scaling.data import synthetic
from hf_ema_scaling.data.synthetic import SyntheticCorpusConfig, assign_voices, build_corpus, sentence

TINY = SyntheticCorpusConfig(
    seed=5,
    labelled_minutes=0.5,
    unlabelled_minutes=1.0,
    evaluation_minutes=0.5,
    labelled_voices=2,
    unlabelled_voices=5,
)


def digest(corpus: DatasetDict) -> str:
    sha = hashlib.sha256()
    for name in sorted(corpus):
        for row in corpus[name].with_format("numpy"):
            sha.update(row["audio"]["array"].astype(np.int16).tobytes())
            sha.update("\t".join(str(row[key]) for key in sorted(row) if key != "audio").encode())
    return sha.hexdigest()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DatasetDict:
    pytest.importorskip("espeakng_loader")
    return build_corpus(TINY, tmp_path_factory.mktemp("corpus"))


def test_the_same_bytes_again_in_this_process(corpus: DatasetDict, tmp_path: Path) -> None:
    with synthetic.ESpeak() as espeak:  # something else was said in between
        espeak.say("something else", "en+m1", rate=180, pitch=50, intonation=50)
    assert digest(build_corpus(TINY, tmp_path)) == digest(corpus)


def test_the_same_bytes_in_a_fresh_process(corpus: DatasetDict, tmp_path: Path) -> None:
    code = (
        "import importlib.util, sys; from pathlib import Path\n"
        "spec = importlib.util.spec_from_file_location('t', sys.argv[1]); t = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(t); print(t.digest(t.build_corpus(t.TINY, Path(sys.argv[2]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, __file__, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == digest(corpus)


def test_another_seed_gives_another_corpus(corpus: DatasetDict, tmp_path: Path) -> None:
    small = replace(TINY, seed=6)
    other = build_corpus(small, tmp_path)
    assert set(other["labelled"]["text"]) != set(corpus["labelled"]["text"])
    assert digest(other) != digest(corpus)


def test_splits_are_disjoint_and_the_truth_is_hidden(corpus: DatasetDict) -> None:
    speakers = {name: set(split["speaker"]) for name, split in corpus.items()}
    voices = assign_voices(TINY)
    assert (len(voices["labelled"]), len(voices["unlabelled"])) == (2, 5)
    assert sum(map(len, voices.values())) == len(set().union(*voices.values())) == len(synthetic.usable_voices())
    assert all(speakers[name] <= set(voices[name]) for name in corpus)
    evaluation = set(corpus["evaluation"]["text"])
    assert evaluation.isdisjoint(corpus["labelled"]["text"])
    assert evaluation.isdisjoint(corpus["unlabelled"]["hidden_reference"])
    assert sorted(corpus["unlabelled"].column_names) == ["audio", "duration", "hidden_reference", "speaker"]
    assert sorted(corpus["labelled"].column_names) == ["audio", "duration", "speaker", "text"]


def test_minutes_and_levels_are_as_asked(corpus: DatasetDict) -> None:
    for name, split in corpus.items():
        asked = 60 * getattr(TINY, f"{name}_minutes")
        assert sum(split["duration"]) == pytest.approx(asked, rel=0.05)
        for row in split.with_format("numpy"):
            assert row["audio"]["sampling_rate"] == 16_000
            assert len(row["audio"]["array"]) == round(row["duration"] * 16_000)
            loudest = TINY.noise if name == "labelled" else TINY.wild_noise
            assert 0.45 < np.abs(row["audio"]["array"].astype(float)).max() / 32767 < 0.5 + 6 * loudest


def test_a_complete_folder_is_reused_and_nothing_else_is_left(
    corpus: DatasetDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = replace(TINY, labelled_minutes=0.02, unlabelled_minutes=0.02, evaluation_minutes=0.02)

    def no_room(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(DatasetDict, "save_to_disk", no_room)
        with pytest.raises(OSError, match="disk full"):
            build_corpus(tiny, tmp_path)
    assert list(tmp_path.iterdir()) == []
    first = build_corpus(tiny, tmp_path)
    assert [folder.name for folder in tmp_path.iterdir()] == [f"synthetic-speech-{tiny.fingerprint()}"]
    monkeypatch.setattr(synthetic, "_split", no_room)
    assert digest(build_corpus(tiny, tmp_path)) == digest(first)
    assert tiny.fingerprint() != TINY.fingerprint()


def test_no_sentence_is_for_training_and_for_evaluation() -> None:
    rng = np.random.default_rng(0)
    training = {sentence(rng, evaluation=False) for _ in range(3000)}
    evaluation = {sentence(rng, evaluation=True) for _ in range(1000)}
    assert training.isdisjoint(evaluation)
    assert len(evaluation) > 80
    fixed = {word for command in synthetic.COMMANDS for word in command.split() if not word.startswith("{")}
    known = fixed.union(*synthetic.SLOTS.values())
    assert {word for text in training | evaluation for word in text.split()} == known


def test_unknown_voices_are_refused() -> None:
    pytest.importorskip("espeakng_loader")
    with synthetic.ESpeak() as espeak, pytest.raises(ValueError, match="no voice 'no-such-voice'"):
        espeak.say("hello", "no-such-voice", rate=180, pitch=50, intonation=50)
    with pytest.raises(ValueError, match="leave none of"):
        assign_voices(replace(TINY, unlabelled_voices=100_000))


def test_a_missing_extra_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ImportError, match=r'pip install "hf-ema-scaling\[demo\]"'):
        build_corpus(TINY, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"evaluation_minutes": 0.0}, "evaluation_minutes must be positive, got 0.0"),
        ({"labelled_voices": 0}, "labelled_voices must be at least 1, got 0"),
        ({"pitch": (60, 40)}, r"pitch must be \(lowest, highest\), got \(60, 40\)"),
        ({"noise": -0.1}, "noise must not be negative"),
    ],
)
def test_configs_without_meaning_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)
