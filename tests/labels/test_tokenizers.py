"""Labels beside the special tokens of transformers' own tokenizers, built from tiny vocabularies.

What a model is fine-tuned on is what its tokenizer makes of a target text. So are the labels that the teacher writes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_generation as tiny
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartTokenizer,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MBart50Tokenizer,
    MBartConfig,
    MBartForConditionalGeneration,
    MBartTokenizer,
    NllbTokenizer,
    SeamlessM4TConfig,
    SeamlessM4TForSpeechToText,
    SeamlessM4TTokenizer,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
    WhisperConfig,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from hf_ema_scaling.data.targets import TextTargets
from hf_ema_scaling.labels import Seq2SeqLabeler, generative_labeler_for
from hf_ema_scaling.labels.decoder import decoder_input_ids

LETTERS = "abcdefgh"
SCORED = [("▁", -1.0), *((letter, -2.0) for letter in LETTERS)]
FAIRSEQ = ["<s>", "<pad>", "</s>", "<unk>"]
BART_IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}


def ids_of(tokens: list[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def bart_like(kind: Any, config: Any, tokenizer: Any, **values: Any) -> Any:
    sizes = {**tiny.BART_LIKE, "vocab_size": len(tokenizer), **BART_IDS, "decoder_start_token_id": 2}
    return tiny._made(kind, config(**sizes | values), 0)


def t5() -> tuple[Any, Any]:
    tokenizer = T5Tokenizer(vocab=[(token, 0.0) for token in ("<pad>", "</s>", "<unk>")] + SCORED, extra_ids=2)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        initializer_factor=3.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return tiny._made(T5ForConditionalGeneration, config, 0, ends=6.0), tokenizer


def bart() -> tuple[Any, Any]:
    tokenizer = BartTokenizer(vocab=ids_of([*FAIRSEQ, "Ġ", *LETTERS, "<mask>"]), merges=[])
    model = bart_like(BartForConditionalGeneration, BartConfig, tokenizer)
    # As bart-large-cnn has it.
    tiny._generation(model, forced_bos_token_id=0, forced_eos_token_id=2)
    return model, tokenizer


def mbart_50() -> tuple[Any, Any]:
    vocabulary = [(token, 0.0) for token in FAIRSEQ] + SCORED + [("en_XX", 0.0), ("fr_XX", 0.0), ("<mask>", 0.0)]
    tokenizer = MBart50Tokenizer(vocab=vocabulary, src_lang="en_XX", tgt_lang="fr_XX")
    return bart_like(MBartForConditionalGeneration, MBartConfig, tokenizer), tokenizer


def mbart_25() -> tuple[Any, Any]:
    vocabulary = [(token, 0.0) for token in FAIRSEQ] + SCORED + [("en_XX", 0.0), ("fr_XX", 0.0), ("<mask>", 0.0)]
    tokenizer = MBartTokenizer(vocab=vocabulary, src_lang="en_XX", tgt_lang="fr_XX")
    start = tokenizer.convert_tokens_to_ids("fr_XX")
    return bart_like(MBartForConditionalGeneration, MBartConfig, tokenizer, decoder_start_token_id=start), tokenizer


def nllb() -> tuple[Any, Any]:
    vocabulary = ids_of([*FAIRSEQ, "▁", *LETTERS, "eng_Latn", "fra_Latn", "<mask>"])
    tokenizer = NllbTokenizer(vocab=vocabulary, merges=[], src_lang="eng_Latn", tgt_lang="fra_Latn")
    return bart_like(M2M100ForConditionalGeneration, M2M100Config, tokenizer), tokenizer


def seamless() -> tuple[Any, Any]:
    languages = ["__eng__", "__fra__"]
    vocabulary = ids_of(["<pad>", "<unk>", "<s>", "</s>", "▁", *LETTERS, *languages])
    tokenizer = SeamlessM4TTokenizer(
        vocab=vocabulary, merges=[], src_lang="eng", tgt_lang="fra", additional_special_tokens=languages
    )
    config = SeamlessM4TConfig(**{**tiny.SEAMLESS, "vocab_size": len(tokenizer)})
    model = tiny._made(SeamlessM4TForSpeechToText, config, 0)
    codes = {name: tokenizer.convert_tokens_to_ids(f"__{name}__") for name in ("eng", "fra")}
    tiny._generation(model, text_decoder_lang_to_code_id=codes)
    return model, tokenizer


def whisper() -> tuple[Any, Any]:
    languages = [f"<|{code}|>" for code in LANGUAGES]
    marks = ["<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    start = ["<|endoftext|>", "<|startoftranscript|>", *languages, "<|translate|>", "<|transcribe|>", *marks]
    vocabulary = ids_of([*start, "Ġ", *LETTERS])
    tokenizer = WhisperTokenizer(
        vocab=vocabulary, merges=[], language="fr", task="translate", additional_special_tokens=start[1:]
    )
    config = WhisperConfig(
        **{
            **tiny.WHISPER,
            "vocab_size": len(tokenizer),
            "decoder_start_token_id": 1,
            **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
        }
    )
    model = tiny._made(WhisperForConditionalGeneration, config, 0)
    tiny._generation(
        model,
        is_multilingual=True,
        lang_to_id={token: vocabulary[token] for token in languages},
        task_to_id={name: vocabulary[f"<|{name}|>"] for name in ("transcribe", "translate")},
        no_timestamps_token_id=vocabulary["<|notimestamps|>"],
        suppress_tokens=[vocabulary[token] for token in start[1:]],
        max_length=20,
    )
    return model, tokenizer


@dataclass(frozen=True)
class Family:
    """A model with its tokenizer."""

    make: Any
    kind: str
    dropped: int
    """Leading ids of the tokenizer's targets that are what the decoder starts with, and so no part of a label."""
    start: str
    """What the decoder reads first."""
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


FAMILIES = {
    "t5": Family(t5, "text", 0, "<pad>"),
    "bart": Family(bart, "text", 0, "</s>", before=("<s>",)),
    "mbart-50": Family(mbart_50, "text", 0, "</s>", before=("fr_XX",), options={"language": "fr_XX"}),
    "mbart-25": Family(mbart_25, "text", 0, "fr_XX", after=("fr_XX",), options={"language": "fr_XX"}),
    "nllb": Family(nllb, "text", 0, "</s>", before=("fra_Latn",), options={"language": "fra_Latn"}),
    "seamless": Family(seamless, "features", 1, "</s>", before=("__fra__",), options={"language": "fra"}),
    "whisper": Family(
        *(whisper, "whisper", 1, "<|startoftranscript|>"),
        before=("<|fr|>", "<|translate|>", "<|notimestamps|>"),
        options={"language": "french", "task": "translate"},
    ),
}


def labeler_of(family: Family) -> tuple[Any, Any, Seq2SeqLabeler]:
    model, tokenizer = family.make()
    labeler = generative_labeler_for(model, tokenizer, max_new_tokens=9, **family.options)
    assert isinstance(labeler, Seq2SeqLabeler)
    return model, tokenizer, labeler


@pytest.mark.parametrize("name", FAMILIES)
def test_a_text_is_the_target_that_its_tokenizer_makes_of_it(name: str) -> None:
    family = FAMILIES[name]
    model, tokenizer, labeler = labeler_of(family)
    text = "bad cafe"
    own = tokenizer(text_target=text).input_ids
    target = TextTargets(labeler, tokenizer)(text)
    assert target == own[family.dropped :]
    end = tokenizer.convert_ids_to_tokens(labeler.eos_ids[0])
    tokens = tokenizer.convert_ids_to_tokens(target)
    assert tuple(tokens[: len(family.before)]) == family.before
    assert tokens[len(tokens) - 1 - len(family.after) :] == [end, *family.after]
    # What the decoder reads in training is what generation has it begin with, and then the target without its last.
    read = decoder_input_ids(model, torch.tensor([target]))[0].tolist()
    assert tokenizer.convert_ids_to_tokens(read[0]) == family.start
    assert read[1:] == target[:-1] and tuple(read[: len(labeler.prompt)]) == labeler.prompt
    # Special tokens aside the text is there again.
    assert tokenizer.decode(target, skip_special_tokens=True).strip() == text


@pytest.mark.parametrize("name", FAMILIES)
def test_labels_are_texts_between_the_tokens_that_belong_there(name: str) -> None:
    family = FAMILIES[name]
    model, tokenizer, labeler = labeler_of(family)
    if family.kind == "text":
        texts = ["bad cafe", "a", "head bag", "cab", "deaf", "gag"]
        batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
        rows = [dict(tokenizer([text], return_tensors="pt")) for text in texts]
    else:
        rows = tiny.rows_for(family.kind)
        batch = tiny.batch_of(rows)
    labels = labeler.label(model, batch)
    for row, label in zip(rows, labels, strict=True):
        [alone] = labeler.label(model, row)
        assert (alone.ids, alone.reason) == (label.ids, label.reason)
        tokens = tokenizer.convert_ids_to_tokens(list(label.ids))
        assert tuple(tokens[: len(family.before)]) == family.before
        assert not family.after or tuple(tokens[-len(family.after) :]) == family.after
        inside = label.ids[len(family.before) : len(label.ids) - len(family.after)]
        special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id, *labeler.eos_ids}
        assert label.reason in ("no_eos", "empty") or (label.reason == "special_tokens") == bool(special & {*inside})
        if not label.kept:
            continue
        # A blank alone is a token that makes no text: what the filter `empty` is for.
        text = tokenizer.decode(list(label.ids), skip_special_tokens=True)
        assert "<" not in text and "_" not in text
    assert len({label.ids for label in labels}) > 1


def test_a_label_with_another_language_in_its_text_is_dropped() -> None:
    model, tokenizer, labeler = labeler_of(FAMILIES["mbart-25"])
    marks = {"en_XX", "fr_XX", "nl_XX", "<mask>", "<s>", "<pad>"}
    assert {*tokenizer.convert_tokens_to_ids([*marks])} <= labeler.never_ids
    assert labeler.never_ids.isdisjoint(tokenizer.convert_tokens_to_ids(["</s>", "<unk>", *LETTERS]))
    batch = dict(tokenizer(["bad cafe", "gag", "hag"], padding=True, return_tensors="pt"))
    anything = dataclasses.replace(labeler, never_ids=frozenset()).label(model, batch)
    # Behind the end of this model's labels stands their language, which is in its place there.
    assert [label.reason for label in anything] == ["no_eos", None, None]
    assert "nl_XX" in tokenizer.convert_ids_to_tokens(list(anything[2].ids))
    assert [label.reason for label in labeler.label(model, batch)] == ["no_eos", None, "special_tokens"]


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.kind == "text"])
def test_languages_and_marks_of_a_source_are_no_text(name: str) -> None:
    """Else ratios of lengths and shares of copied tokens would count them."""
    family = FAMILIES[name]
    _, tokenizer, labeler = labeler_of(family)
    source = dict(tokenizer(["abba"], return_tensors="pt"))
    letters = tokenizer(text_target="abba", add_special_tokens=False).input_ids
    [scores] = labeler._scores(source, [tuple([*labeler.prompt[1:], *letters[:2], *labeler.eos_ids])])
    assert scores == {"length_ratio": 2 / len(letters), "copy": 1.0}


def test_m2m100_knows_its_languages_by_code() -> None:
    """Its tokenizer needs SentencePiece; what the labeler asks of it is `get_lang_id`."""

    def get_lang_id(code: str) -> int:
        return {"fr": 7}[code]

    tokenizer = SimpleNamespace(all_special_ids=(0, 1, 2, 7), unk_token_id=3, get_lang_id=get_lang_id)
    labeler = generative_labeler_for(tiny.m2m100(), tokenizer, language="fr")
    assert isinstance(labeler, Seq2SeqLabeler) and labeler.prompt == (2, 7)
    with pytest.raises(ValueError, match="knows no language 'xx'"):
        generative_labeler_for(tiny.m2m100(), tokenizer, language="xx")


def test_whispers_times_are_refused() -> None:
    model, tokenizer, labeler = labeler_of(FAMILIES["whisper"])
    targets = TextTargets(labeler, tokenizer)
    with pytest.raises(ValueError, match=r"text '<\|0.00\|> bad<\|1.20\|>' holds the time <\|0.00\|>"):
        targets("<|0.00|> bad<|1.20|>")
    model.generation_config.return_timestamps = True
    with pytest.raises(ValueError, match="return_timestamps is on, and labels have no times"):
        generative_labeler_for(model, tokenizer, language="fr")
