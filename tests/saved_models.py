"""Random generating models saved with tokenizers that were trained on a few texts, as checkpoints of the Hub are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny_generation
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    M2M100Config,
    M2M100ForConditionalGeneration,
    MBart50Tokenizer,
    MBartConfig,
    MBartForConditionalGeneration,
    MBartTokenizer,
    MoonshineConfig,
    MoonshineForConditionalGeneration,
    NllbTokenizer,
    PreTrainedTokenizerFast,
    SeamlessM4TConfig,
    SeamlessM4TFeatureExtractor,
    SeamlessM4TForSpeechToText,
    SeamlessM4TProcessor,
    SeamlessM4TTokenizer,
    Speech2TextFeatureExtractor,
    Speech2TextForConditionalGeneration,
    Speech2TextProcessor,
    Speech2TextTokenizer,
    T5Tokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
)

FAIRSEQ = ["<s>", "<pad>", "</s>", "<unk>"]
BART_IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}


def unigram(texts: Sequence[str], size: int = 40) -> list[tuple[str, float]]:
    """Pieces of a unigram model and their scores, special tokens left out."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(
        texts,
        trainers.UnigramTrainer(vocab_size=size, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False),
    )
    found = json.loads(tokenizer.to_str())["model"]["vocab"]
    return [(piece, score) for piece, score in found if piece != "<unk>"]


def pairs(texts: Sequence[str], size: int = 40) -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens and merges of byte pair encoding, special tokens left out."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>"], show_progress=False)
    )
    found = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(found["vocab"], key=found["vocab"].__getitem__)
    return [token for token in tokens if token != "<unk>"], [tuple(merge) for merge in found["merges"]]


def sentencepiece_model(texts: Sequence[str], folder: Path, size: int = 40) -> tuple[Path, list[str]]:
    """The file of a model that the library of that name has trained, and its pieces without special ones."""
    import sentencepiece  # type: ignore[import-not-found]

    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*texts] * 20),
        model_prefix=str(folder / "trained"),
        vocab_size=size,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "trained.model"))
    return folder / "trained.model", [model.id_to_piece(i) for i in range(3, len(model))]


def ids_of(tokens: Sequence[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def _bart_like(kind: Any, config: Any, tokenizer: Any, seed: int, **values: Any) -> Any:
    """Hardly ever writes a special token, and a language even less, but its end."""
    sizes = {**tiny_generation.BART_LIKE, "vocab_size": len(tokenizer), **BART_IDS}
    model = tiny_generation._made(kind, config(**sizes | values), seed)
    never = {*tokenizer.all_special_ids, *range(len(tokenizer), model.config.vocab_size)} - {2}
    with torch.no_grad():
        model.get_output_embeddings().weight[sorted(never)] = 0.0
    return model


def _saved(folder: Path, model: Any, processing: Any) -> Path:
    model.save_pretrained(folder)
    processing.save_pretrained(folder)
    return folder


def t5(folder: Path, texts: Sequence[str], seed: int = 0) -> Path:
    vocabulary = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")] + unigram(texts)
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=2)
    return _saved(folder, tiny_generation.t5(seed, vocab_size=len(tokenizer)), tokenizer)


def mbart_50(folder: Path, texts: Sequence[str], seed: int = 0) -> Path:
    """Its decoder begins with `</s>` and the language."""
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *unigram(texts)]
    tokenizer = MBart50Tokenizer(vocab=vocabulary)
    return _saved(folder, _bart_like(MBartForConditionalGeneration, MBartConfig, tokenizer, seed), tokenizer)


def mbart_25(folder: Path, texts: Sequence[str], seed: int = 0) -> Path:
    """Its decoder begins with the language."""
    codes = [(code, 0.0) for code in ("en_XX", "fr_XX")]
    vocabulary = [(token, 0.0) for token in FAIRSEQ] + unigram(texts) + codes + [("<mask>", 0.0)]
    tokenizer = MBartTokenizer(vocab=vocabulary)
    start = tokenizer.convert_tokens_to_ids("fr_XX")
    model = _bart_like(MBartForConditionalGeneration, MBartConfig, tokenizer, seed, decoder_start_token_id=start)
    return _saved(folder, model, tokenizer)


def nllb(folder: Path, texts: Sequence[str], seed: int = 0) -> Path:
    tokens, merges = pairs(texts)
    tokenizer = NllbTokenizer(vocab=ids_of([*FAIRSEQ, *tokens]), merges=merges)
    return _saved(folder, _bart_like(M2M100ForConditionalGeneration, M2M100Config, tokenizer, seed), tokenizer)


def m2m100(folder: Path, texts: Sequence[str], seed: int = 0) -> Path:
    from transformers import M2M100Tokenizer

    model_file, pieces = sentencepiece_model(texts, folder / "sentencepiece")
    (folder / "pieces.json").write_text(json.dumps(ids_of([*FAIRSEQ, *pieces])), encoding="utf-8")
    tokenizer = M2M100Tokenizer(str(folder / "pieces.json"), str(model_file))
    # As the files of published checkpoints list them.
    languages = list(tokenizer.lang_token_to_id)
    tokenizer = M2M100Tokenizer(str(folder / "pieces.json"), str(model_file), additional_special_tokens=[*languages])
    # Behind the languages are ids that nobody uses; none of them counts in the length of the tokenizer.
    size = len(tokenizer.encoder) + len(languages) + tokenizer.num_madeup_words
    model = _bart_like(M2M100ForConditionalGeneration, M2M100Config, tokenizer, seed, vocab_size=size)
    return _saved(folder, model, tokenizer)


def moonshine(folder: Path, texts: Sequence[str], seed: int = 0) -> Path:
    """A Llama tokenizer, without padding; audio as samples."""
    tokens, merges = pairs(texts)
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *tokens]
    backend = Tokenizer(models.BPE(ids_of(names), merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    sizes = {name: 1 for name in ("encoder_num_hidden_layers", "decoder_num_hidden_layers")}
    heads = {name: 2 for name in ("encoder_num_attention_heads", "decoder_num_attention_heads")}
    config = MoonshineConfig(
        vocab_size=len(names),
        hidden_size=16,
        intermediate_size=16,
        max_position_embeddings=64,
        initializer_range=0.6,
        **sizes,
        **heads,
    )
    model = tiny_generation._made(MoonshineForConditionalGeneration, config, seed)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True)
    return _saved(folder, model, Wav2Vec2Processor(extractor, tokenizer))


def speech2text(folder: Path, texts: Sequence[str], seed: int = 0) -> Path:
    model_file, pieces = sentencepiece_model(texts, folder / "sentencepiece")
    (folder / "pieces.json").write_text(json.dumps(ids_of([*FAIRSEQ, *pieces])), encoding="utf-8")
    tokenizer = Speech2TextTokenizer(str(folder / "pieces.json"), str(model_file), do_upper_case=True)
    config = tiny_generation.speech2text().config
    config.vocab_size = len(tokenizer)
    model = tiny_generation._made(Speech2TextForConditionalGeneration, config, seed)
    extractor = Speech2TextFeatureExtractor(feature_size=8, num_mel_bins=8)
    return _saved(folder, model, Speech2TextProcessor(extractor, tokenizer))


def seamless(folder: Path, texts: Sequence[str], seed: int = 0) -> Path:
    tokens, merges = pairs(texts)
    codes = ["__eng__", "__fra__"]
    tokenizer = SeamlessM4TTokenizer(
        vocab=ids_of(["<pad>", "<unk>", "<s>", "</s>", *tokens, *codes]),
        merges=merges,
        additional_special_tokens=codes,
    )
    config = SeamlessM4TConfig(**{**tiny_generation.SEAMLESS, "vocab_size": len(tokenizer)})
    model = tiny_generation._made(SeamlessM4TForSpeechToText, config, seed)
    ids = {code.strip("_"): tokenizer.convert_tokens_to_ids(code) for code in codes}
    tiny_generation._generation(model, text_decoder_lang_to_code_id=ids)
    model.generation_config._from_model_config = False
    extractor = SeamlessM4TFeatureExtractor(feature_size=4, num_mel_bins=4, stride=2)
    return _saved(folder, model, SeamlessM4TProcessor(extractor, tokenizer))
