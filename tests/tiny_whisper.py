"""A random Whisper with processor in a folder: letters for tokens, a window of 2 s."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny_generation
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import WhisperFeatureExtractor

START = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|fr|>", "<|transcribe|>", "<|translate|>"]
"""Ids 2 to 7, as `tiny_generation.whisper` has them."""
LAST = ["<|nospeech|>", "<|notimestamps|>"]
"""Ids 22 and 23: `generate` takes what stands behind them for times."""
TOKENS = ["!", ".", *START, "z", "y", "Ġ", *"abcdefghijk", *LAST]
WINDOW = 2


def extractor() -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=4, chunk_length=WINDOW)


def save(folder: Path, *, english: bool = False, **changes: Any) -> Path:
    """Write model, tokenizer and feature extractor; changes are of the model's configuration."""
    shape = {"max_source_positions": 50 * WINDOW, **changes}
    model = tiny_generation.whisper(**shape)
    if english:
        model.generation_config.is_multilingual = False
        del model.generation_config.lang_to_id, model.generation_config.task_to_id
    model.generation_config.no_timestamps_token_id = 23
    model.generation_config.suppress_tokens = [3, 4, 5, 6, 7, 22, 23]
    # Else loading would make it anew from the model's configuration.
    model.generation_config._from_model_config = False
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*START, *LAST])
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    settings = {
        "tokenizer_class": "WhisperTokenizer",
        **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), START[0]),
        "processor_class": "WhisperProcessor",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    extractor().save_pretrained(folder)
    return folder
