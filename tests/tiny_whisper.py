"""A random Whisper with processor in a folder: letters for tokens, a window of 2 s."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny_generation
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import WhisperFeatureExtractor

SPECIAL = [
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|en|>",
    "<|fr|>",
    "<|transcribe|>",
    "<|translate|>",
    "<|nospeech|>",
    "<|notimestamps|>",
]
"""Ids 2 to 9, as `tiny_generation.whisper` has them."""
TOKENS = ["!", ".", *SPECIAL, "Ġ", *"abcdefghijklm"]
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
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    settings = {
        "tokenizer_class": "WhisperTokenizer",
        **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), SPECIAL[0]),
        "processor_class": "WhisperProcessor",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    extractor().save_pretrained(folder)
    return folder
