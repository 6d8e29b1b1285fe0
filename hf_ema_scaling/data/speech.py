"""A processor of characters for speech, and SpecAugment."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets
import torch
import torchaudio
from torch import Tensor
from transformers import Speech2TextFeatureExtractor, Wav2Vec2BertProcessor, Wav2Vec2CTCTokenizer

from hf_ema_scaling.data.seeding import spread_seed

PAD, DELIMITER, UNKNOWN = "<pad>", "|", "<unk>"


def build_character_processor(
    texts: Iterable[str], *, sampling_rate: int = 16_000, num_mel_bins: int = 80
) -> Wav2Vec2BertProcessor:
    """A processor for a CTC model trained from scratch on log-mel features and characters.

    Features are Kaldi log-mel filter banks, every 10 ms, each bin with mean 0 and variance 1 over the utterance
    (`Speech2TextFeatureExtractor`). Ids are 0 `<pad>`, which is also the CTC blank, 1 `|` between words, 2 `<unk>`,
    then the characters in code point order. `Wav2Vec2BertProcessor` is the processor class of transformers that pairs
    `input_features` with this tokenizer; `AutoProcessor.from_pretrained` reads it back from its own folder.

    Args:
        texts: texts whose characters make the vocabulary, or an alphabet as one string. Case counts.
        sampling_rate: in hertz.
        num_mel_bins: features per frame.

    Raises:
        ValueError: when there are no characters.
    """
    characters = sorted({character for text in texts for character in text if not character.isspace()} - {DELIMITER})
    if not characters:
        raise ValueError("no characters to make a vocabulary of: give training texts, or an alphabet")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vocab.json"
        file.write_text(json.dumps({token: i for i, token in enumerate([PAD, DELIMITER, UNKNOWN, *characters])}))
        tokenizer = Wav2Vec2CTCTokenizer(
            str(file), bos_token=None, eos_token=None, unk_token=UNKNOWN, pad_token=PAD, word_delimiter_token=DELIMITER
        )
    extractor = Speech2TextFeatureExtractor(
        feature_size=num_mel_bins, num_mel_bins=num_mel_bins, sampling_rate=sampling_rate
    )
    return Wav2Vec2BertProcessor(feature_extractor=extractor, tokenizer=tokenizer)


@contextmanager
def quiet_unless_terminal() -> Iterator[None]:
    """No progress bars of `datasets` where nobody would see them move."""
    silence = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    if silence:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if silence:
            datasets.enable_progress_bars()


class SpecAugment:
    """Masks bands of bins and spans of frames with zeros (SpecAugment, arXiv 1904.08779, without time warping).

    Zero is the mean of features that were normalised per utterance, as `build_character_processor` makes them. What a
    row becomes depends on its seed, content and length, not on its neighbours, the padding, the device or the global
    random state, which is left as it was.

    Args:
        num_freq_masks: masks over bins.
        freq_width: each is narrower than this many bins.
        num_time_masks: masks over frames.
        time_width: each is shorter than this many frames,
        time_share: and than this share of the utterance.
        bins_first: whether features are (rows, bins, frames) in a window without attention mask, as Whisper's are.

    Raises:
        ValueError: when a number is negative, or `time_share` is not in [0, 1].
    """

    def __init__(
        self,
        num_freq_masks: int = 2,
        freq_width: int = 15,
        num_time_masks: int = 2,
        time_width: int = 20,
        time_share: float = 0.2,
        *,
        bins_first: bool = False,
    ) -> None:
        counts = (num_freq_masks, freq_width, num_time_masks, time_width)
        if min(counts) < 0 or not 0.0 <= time_share <= 1.0:
            raise ValueError(f"masks {counts} must not be negative, and time_share {time_share} must be in [0, 1]")
        self.num_freq_masks = num_freq_masks
        self.freq_width = freq_width
        self.num_time_masks = num_time_masks
        self.time_width = time_width
        self.time_share = time_share
        self.bins_first = bins_first

    def __call__(self, inputs: Mapping[str, Tensor], seeds: Sequence[int]) -> dict[str, Tensor]:
        """The `input_features` of padded inputs, masked; `attention_mask` tells their lengths where there is one.

        Raises:
            ValueError: when the inputs have no `input_features`.
        """
        features = inputs.get("input_features")
        if features is None:
            raise ValueError(f"SpecAugment masks 'input_features', which are not among the inputs {sorted(inputs)}")
        if self.bins_first:
            frames = [features.shape[2]] * len(features)
            return {"input_features": self.masked(features.transpose(1, 2), frames, seeds).transpose(1, 2)}
        mask = inputs.get("attention_mask")
        lengths = [features.shape[1]] * len(features) if mask is None else mask.sum(-1)
        return {"input_features": self.masked(features, lengths, seeds)}

    def masked(self, features: Tensor, lengths: Tensor | Sequence[int], seeds: Sequence[int]) -> Tensor:
        """A masked copy of `features` (rows, frames, bins); padding behind `lengths` is not touched.

        Raises:
            ValueError: when there is not one length and one seed per row.
        """
        rows, frames, bins = features.shape
        sizes = [int(length) for length in lengths]
        if len(sizes) != rows or len(seeds) != rows or max(sizes, default=0) > frames:
            raise ValueError(
                f"features {tuple(features.shape)} need {rows} lengths of at most {frames} and {rows} seeds, got "
                f"{sizes} and {len(seeds)} seeds"
            )
        masked = torch.zeros(rows, frames, bins, dtype=torch.bool)
        # torchaudio draws from the global CPU generator, so each row seeds it and the fork puts it back.
        with torch.random.fork_rng(devices=[]):
            for row, (size, seed) in enumerate(zip(sizes, seeds, strict=True)):
                torch.default_generator.manual_seed(spread_seed(seed))
                masked[row, :size] = self._mask(size, bins)
        return features.masked_fill(masked.to(features.device), 0.0)

    def _mask(self, frames: int, bins: int) -> Tensor:
        """True (frames, bins) where one utterance is masked."""
        kept = torch.ones(1, frames, bins)
        time_width = min(self.time_width, int(frames * self.time_share))
        for _ in range(self.num_time_masks):
            kept = torchaudio.functional.mask_along_axis(kept, time_width, 0.0, axis=1)
        for _ in range(self.num_freq_masks):
            kept = torchaudio.functional.mask_along_axis(kept, min(self.freq_width, bins), 0.0, axis=2)
        return kept[0] == 0
