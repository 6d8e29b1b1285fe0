"""A corpus of synthetic speech, made in process by eSpeak NG (GPL-3.0-or-later: the optional extra `demo`)."""

from __future__ import annotations

import _ctypes
import ctypes
import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, List, Value, load_from_disk
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from hf_ema_scaling.data.audio import Waveform, resample
from hf_ema_scaling.data.speech import quiet_unless_terminal

logger = logging.getLogger(__name__)

FORMAT = 2  # part of the cache key: raise it whenever the same config makes other data
SPLITS = ("labelled", "unlabelled", "evaluation")

# Names by which espeak_SetVoiceByName finds an accent together with a variant ("en-gb" is filed under "en").
ACCENTS = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-us-nyc")
# Variants that imitate machines, monsters or tape at the wrong speed: nobody's unlabelled speech sounds like them.
NOT_HUMAN = (
    *("AnxiousAndy", "Demonic", "RicishayMax", "Tweaky", "UniRobot", "anikaRobot", "announcer", "croak", "fast"),
    *("kaukovalta", "klatt", "rob", "whisper", "zac"),
)

# What one says to a house. Sentences are redundant, as speech is, so a model can hear a word by its neighbours.
COMMANDS = (
    "turn {switch} the {room} {device}",
    "{move} the {room} {opening}",
    "wake me at {digit} {minutes} on {day}",
    "send a message to {name} on {day}",
    "play some {music} music in the {room}",
    "add {digit} {food} to the shopping list",
    "what is the weather in {city} on {day}",
    "call {name} on {digit} {digit} {digit}",
)
SLOTS = {
    slot: tuple(words.split())
    for slot, words in {
        "switch": "on off",
        "move": "open close lock",
        "room": "kitchen bedroom garden office",
        "device": "light heater radio camera",
        "opening": "window door",
        "minutes": "fifteen thirty forty",
        "day": "monday tuesday friday sunday",
        "name": "anna peter maria david",
        "music": "jazz rock dance piano",
        "food": "apples eggs lemons cookies",
        "city": "london paris berlin madrid",
        "digit": "one two three four five six seven eight nine",
    }.items()
}
EVALUATION_SHARE = 10  # one sentence of the grammar in this many is for evaluation


@dataclass(frozen=True, slots=True)
class SyntheticCorpusConfig:
    """Everything the corpus depends on: equal configs give equal bytes.

    Raises:
        ValueError: when a size is not positive, or a range is empty.
    """

    seed: int = 0
    labelled_minutes: float = 7.0
    unlabelled_minutes: float = 45.0
    evaluation_minutes: float = 6.0
    labelled_voices: int = 40
    """Voices (accent and variant) of the labelled split."""
    unlabelled_voices: int = 260
    """Voices of the unlabelled split; the evaluation split has all others."""
    noise: float = 0.02
    """White noise of the labelled split, which is spoken in a quiet room: its standard deviation is uniform in
    [0, noise) per utterance, at a speech peak of 0.5."""
    wild_noise: float = 0.16
    """The same for the unlabelled and the evaluation split, which are recorded anywhere."""
    rate: tuple[int, int] = (140, 210)
    """Words per minute, lowest and highest."""
    pitch: tuple[int, int] = (25, 75)
    """eSpeak's base pitch, 0 to 99."""
    intonation: tuple[int, int] = (20, 80)
    """eSpeak's pitch range, 0 to 99."""
    sampling_rate: int = 16_000
    """Of the corpus, in hertz; eSpeak itself gives 22,050."""

    def __post_init__(self) -> None:
        for name in ("labelled_minutes", "unlabelled_minutes", "evaluation_minutes", "sampling_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("labelled_voices", "unlabelled_voices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("rate", "pitch", "intonation"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must be (lowest, highest), got {(low, high)}")
        for name in ("noise", "wild_noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def fingerprint(self) -> str:
        """Hash of the config, the installed eSpeak NG and the code's own format number."""
        key = {**asdict(self), "format": FORMAT, "espeak": version("espeakng-loader")}
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _loader() -> Any:
    try:
        import espeakng_loader
    except ImportError as error:
        raise ImportError('the synthetic corpus is spoken by eSpeak NG: pip install "hf-ema-scaling[demo]"') from error
    return espeakng_loader


_SYNTH_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class ESpeak:
    """A freshly loaded eSpeak NG, as a context manager; one at a time per process.

    The C library keeps state between utterances that neither `espeak_Terminate` nor a seed resets, so leaving the
    context unloads it from the process. What a fresh copy says depends on its arguments only.
    """

    _lock = threading.Lock()

    def __enter__(self) -> Self:
        loader = _loader()
        self._lock.acquire()
        try:
            self._library = ctypes.CDLL(str(loader.get_library_path()))
            self._library.espeak_Synth.argtypes = [
                *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int),
                *(ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p),
            ]
            # 2: synchronous, samples to the callback; 0x8000: return an error where the library would exit.
            self.sampling_rate: int = self._library.espeak_Initialize(
                2, 0, str(loader.get_data_path()).encode(), 0x8000
            )
            if self.sampling_rate <= 0:
                self._unload()
                raise RuntimeError(f"eSpeak NG does not start (code {self.sampling_rate})")
        except BaseException:
            self._lock.release()
            raise
        self._chunks: list[bytes] = []
        self._callback = _SYNTH_CALLBACK(self._receive)
        self._library.espeak_SetSynthCallback(self._callback)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._library.espeak_Terminate()
            self._unload()
        finally:
            self._lock.release()

    def _unload(self) -> None:
        handle = self._library._handle
        del self._library
        unload: Callable[[int], None] = getattr(_ctypes, "dlclose", None) or _ctypes.FreeLibrary  # type: ignore[attr-defined]
        unload(handle)

    def _receive(self, samples: Any, count: int, _events: int | None) -> int:
        if samples and count > 0:
            self._chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    def set_voice(self, voice: str) -> bool:
        """Choose a voice such as "en-us+f3"; False when eSpeak has none of this name."""
        return bool(self._library.espeak_SetVoiceByName(voice.encode()) == 0)

    def say(self, text: str, voice: str, *, rate: int, pitch: int, intonation: int) -> Waveform:
        """Speech as float32 (samples,) in [-1, 1], at `self.sampling_rate`.

        Raises:
            ValueError: when there is no such voice.
            RuntimeError: when eSpeak refuses the text.
        """
        if not self.set_voice(voice):
            raise ValueError(f"eSpeak NG has no voice '{voice}'")
        for parameter, value in ((1, rate), (3, pitch), (4, intonation)):
            self._library.espeak_SetParameter(parameter, value, 0)
        self._chunks.clear()
        content = text.encode() + b"\0"
        code = self._library.espeak_Synth(content, len(content), 0, 0, 0, 1, None, None)  # 1: the text is UTF-8
        if code != 0 or self._library.espeak_Synchronize() != 0:
            raise RuntimeError(f"eSpeak NG does not say {text!r} (code {code})")
        samples = np.frombuffer(b"".join(self._chunks), dtype="<i2")
        return samples.astype(np.float32) * np.float32(2**-15)


def _breathes(variant: Path) -> bool:
    lines = variant.read_text(encoding="utf-8", errors="replace").splitlines()
    return any(line.split()[:1] == ["breath"] for line in lines)


@lru_cache(maxsize=1)
def usable_voices() -> tuple[str, ...]:
    """All voices of the corpus, sorted: eight English accents times the human variants that eSpeak NG can load.

    Without variants that breathe: their noise comes from the C library's `rand` or differs from process to process.
    """
    files = (Path(_loader().get_data_path()) / "voices" / "!v").iterdir()
    variants = [file.name for file in files if not _breathes(file) and not file.name.startswith(NOT_HUMAN)]
    names = [f"{accent}+{variant}" for accent in ACCENTS for variant in variants]
    with ESpeak() as espeak:
        return tuple(sorted(name for name in names if espeak.set_voice(name)))


def assign_voices(config: SyntheticCorpusConfig) -> dict[str, tuple[str, ...]]:
    """The voices of each split, a partition of `usable_voices`.

    Raises:
        ValueError: when no voice is left for the evaluation split.
    """
    voices = usable_voices()
    first, second = config.labelled_voices, config.labelled_voices + config.unlabelled_voices
    if second >= len(voices):
        raise ValueError(
            f"{config.labelled_voices} labelled and {config.unlabelled_voices} unlabelled voices leave none of "
            f"{len(voices)} for evaluation"
        )
    shuffled = [voices[i] for i in np.random.default_rng([config.seed, len(SPLITS)]).permutation(len(voices))]
    return dict(zip(SPLITS, map(tuple, (shuffled[:first], shuffled[first:second], shuffled[second:])), strict=True))


def sentence(rng: np.random.Generator, *, evaluation: bool) -> str:
    """One of the `COMMANDS` with its slots filled.

    A hash of the sentence itself says whether it is for evaluation, so no sentence is ever in both kinds of split.
    """
    while True:
        words = COMMANDS[int(rng.integers(len(COMMANDS)))].split()
        text = " ".join(_filled(word, rng) for word in words)
        digest = hashlib.sha256(text.encode()).digest()
        if (digest[0] % EVALUATION_SHARE == 0) == evaluation:
            return text


def _filled(word: str, rng: np.random.Generator) -> str:
    choices = SLOTS[word.strip("{}")] if word.startswith("{") else (word,)
    return choices[int(rng.integers(len(choices)))]


def _utterance(
    config: SyntheticCorpusConfig, name: str, voices: tuple[str, ...], rng: np.random.Generator
) -> tuple[npt.NDArray[np.int16], str, str]:
    """Samples at the corpus rate, the sentence, the voice of an utterance of split `name`, from the arguments only."""
    voice = voices[int(rng.integers(len(voices)))]
    text = sentence(rng, evaluation=name == "evaluation")
    rate, pitch, intonation = (
        int(rng.integers(low, high, endpoint=True)) for low, high in (config.rate, config.pitch, config.intonation)
    )
    with ESpeak() as espeak:
        spoken = espeak.say(text, voice, rate=rate, pitch=pitch, intonation=intonation)
        waveform = resample(spoken, espeak.sampling_rate, config.sampling_rate)
    peak = float(np.abs(waveform).max(initial=0.0))
    if peak < 1e-3:
        raise RuntimeError(f"eSpeak NG is silent on {text!r} with voice {voice}")
    loudest = config.noise if name == "labelled" else config.wild_noise
    noise = loudest * rng.random() * rng.standard_normal(len(waveform))
    mixed = waveform.astype(np.float64) * (0.5 / peak) + noise
    return (mixed.clip(-1, 1) * 32767).round().astype(np.int16), text, voice


def _split(config: SyntheticCorpusConfig, name: str, voices: tuple[str, ...]) -> Dataset:
    target = 60.0 * float(getattr(config, f"{name}_minutes"))
    text_column = "hidden_reference" if name == "unlabelled" else "text"
    waveforms: list[npt.NDArray[np.int16]] = []
    rows: list[dict[str, str | float]] = []
    spoken = 0.0
    with tqdm(total=round(target), desc=f"speaking {name}", unit="s", disable=None) as progress:
        while spoken < target:
            rng = np.random.default_rng([config.seed, SPLITS.index(name), len(rows)])
            samples, text, voice = _utterance(config, name, voices, rng)
            seconds = len(samples) / config.sampling_rate
            if rows and spoken + seconds - target > target - spoken:
                break  # nearer to the target without this one
            waveforms.append(samples)
            rows.append({text_column: text, "speaker": voice, "duration": seconds})
            spoken += seconds
            progress.update(seconds)
    features = Features(
        {
            "audio": {"array": List(Value("int16")), "sampling_rate": Value("int64")},
            text_column: Value("string"),
            "speaker": Value("string"),
            "duration": Value("float64"),
        }
    )
    # As Arrow arrays: on its way through Python numbers the corpus would take thirty times its size.
    offsets = pa.array(np.cumsum([0, *map(len, waveforms)]), pa.int32())
    samples = pa.ListArray.from_arrays(offsets, np.concatenate(waveforms))
    rates = pa.array([config.sampling_rate] * len(rows), pa.int64())
    audio = pa.StructArray.from_arrays([samples, rates], names=["array", "sampling_rate"])
    columns = {name: [row[name] for row in rows] for name in (text_column, "speaker", "duration")}
    return Dataset.from_dict({"audio": audio, **columns}, features=features)


def _checked(corpus: DatasetDict) -> DatasetDict:
    """Refuses a corpus whose splits share a speaker, or whose evaluation sentences were trained on."""
    speakers = {name: set(split["speaker"]) for name, split in corpus.items()}
    texts = {
        name: set(split["hidden_reference" if name == "unlabelled" else "text"]) for name, split in corpus.items()
    }
    for name in ("labelled", "unlabelled"):
        for what, sets in (("speakers", speakers), ("sentences", texts)):
            shared = sets[name] & sets["evaluation"]
            if shared:
                raise RuntimeError(f"{what} of the evaluation split are in the {name} split: {sorted(shared)[:5]}")
    if speakers["labelled"] & speakers["unlabelled"]:
        raise RuntimeError("the labelled and the unlabelled split share speakers")
    return corpus


def build_corpus(config: SyntheticCorpusConfig, cache_dir: str | Path) -> DatasetDict:
    """Speak the corpus, or load it from the cache.

    No two splits share a voice, though voices of different accents may share a variant, that is a timbre. No
    evaluation sentence is in a training split; labelled and unlabelled sentences are drawn independently and may
    coincide.

    Args:
        config: what to make.
        cache_dir: holds one folder per config; a folder appears there only once it is complete.

    Returns:
        Splits `labelled`, `unlabelled` and `evaluation` with the columns `audio` (`{"array": int16, "sampling_rate"}`,
        which needs no decoder), `text`, `speaker` and `duration` in seconds; the true text of the unlabelled split is
        in `hidden_reference` instead. Each split is as long as asked for, to half an utterance.

    Raises:
        ImportError: when the extra `demo` is not installed.
        ValueError: when the voices do not suffice.
    """
    _loader()
    folder = Path(cache_dir) / f"synthetic-speech-{config.fingerprint()}"
    if not folder.is_dir():
        corpus = _checked(DatasetDict({name: _split(config, name, v) for name, v in assign_voices(config).items()}))
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
        try:
            with quiet_unless_terminal():
                corpus.save_to_disk(building)
            (building / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
            os.replace(building, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster with the same corpus
                raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
        logger.info("spoke %s", ", ".join(f"{len(split)} {name}" for name, split in corpus.items()))
    return DatasetDict(load_from_disk(str(folder)))
