"""The labeler of a generating model: what its decoder begins with, how a label ends, how long it may be.

What each family's decoder is to be started with, and what its own loss expects as labels, is in the functions below.
"""

from __future__ import annotations

from typing import Any

from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from hf_ema_scaling.labels.causal import CausalLMLabeler
from hf_ema_scaling.labels.decoder import bare, decoder_start, is_encoder_decoder, wraps_last_token
from hf_ema_scaling.labels.generation import Decoding
from hf_ema_scaling.labels.seq2seq import Seq2SeqLabeler

POSITIONS = ("max_target_positions", "max_position_embeddings", "n_positions")
# The first layers of these encoders mix padding into frames that are not padding: a group norm over time (Moonshine),
# strided convolutions without masks (Speech2Text and the length adaptor of SeamlessM4T).
SEES_PADDING = ("moonshine", "speech_to_text", "seamless_m4t", "seamless_m4t_v2")
# Their decoders do nothing sensible without a target language.
MANY_LANGUAGES = ("m2m_100", "nllb-moe", "seamless_m4t", "seamless_m4t_v2")


def generative_labeler_for(
    model: Any,
    processing_class: Any | None = None,
    *,
    language: str | None = None,
    task: str | None = None,
    max_new_tokens: int | None = None,
    max_target_tokens: int | None = None,
    num_beams: int = 1,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    by_length: bool | None = None,
) -> Seq2SeqLabeler | CausalLMLabeler:
    """The labeler of an encoder-decoder or causal language model of transformers.

    Args:
        model: the model, wrapped or not; its `generation_config` says how labels begin and end.
        processing_class: its tokenizer or processor: which ids are no text, and the ids of languages.
        language: of the labels. Whisper: code or name; None lets the teacher choose for each row. SeamlessM4T, mBART,
            M2M100 and NLLB: as in their tokenizers; None takes `forced_bos_token_id` of the generation config.
        task: Whisper's, "transcribe" (also None) or "translate".
        max_new_tokens: tokens after which a label without an end is given up. None for what the generation config
            says, else, for encoder-decoders, as many as their decoder has positions.
        max_target_tokens: longest target (causal: prompt and label together) the student is to learn. None for as
            many as the model has positions.
        num_beams: as in `Decoding`.
        temperature: as in `Decoding`.
        top_k: as in `Decoding`.
        top_p: as in `Decoding`.
        seed: as in `Decoding`.
        by_length: whether rows of unlike lengths are decoded apart. None where the encoder's output depends on
            padding, which costs time; False accepts labels that depend on the batch.

    Raises:
        ValueError: when the model does not say how its labels begin or end, with the way out.
    """
    model = bare(model)
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    eos_ids = end_ids(model)
    config = model.generation_config
    positions = _positions(model)
    special = {*eos_ids, *_ids(model, "bos_token_id"), *_ids(model, "pad_token_id")}
    special |= set(getattr(tokenizer, "all_special_ids", ()))
    style: dict[str, Any] = {
        "num_beams": num_beams,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }
    if max_new_tokens is None:
        max_new_tokens = getattr(config, "max_new_tokens", None)
    kind = str(model.config.model_type)

    if not is_encoder_decoder(model):
        if language is not None or task is not None:
            raise ValueError(f"language and task are for encoder-decoders, and {type(model).__name__} is none")
        if max_new_tokens is None:
            raise ValueError(
                "max_new_tokens is required: the tokens after which a continuation without end is given up"
            )
        return CausalLMLabeler(
            eos_ids=eos_ids,
            decoding=Decoding(max_new_tokens, **style),
            max_positions=positions,
            max_target_tokens=max_target_tokens,
            special_ids=frozenset(special),
        )

    if kind != "whisper" and task is not None:
        raise ValueError(f"task={task!r} is Whisper's, and the model is of type {kind}")
    languages: tuple[int, ...] = ()
    if kind == "whisper":
        prompt, languages = _whisper_prompt(model, language, task)
    else:
        prompt = _prompt(model, kind, tokenizer, language)
    # What mBART's decoder begins with is the last token of its labels; a language is written behind the end for that.
    suffix = prompt[:1] if wraps_last_token(model) and prompt[0] not in eos_ids else ()
    if max_new_tokens is None:
        limit = getattr(config, "max_length", None) or positions
        if limit is None:
            raise ValueError(
                f"{type(model).__name__} has no limit of positions: give max_new_tokens, the tokens after which a "
                "label without end is given up"
            )
        max_new_tokens = limit - len(prompt)
    return Seq2SeqLabeler(
        prompt=prompt,
        eos_ids=eos_ids,
        decoding=Decoding(max_new_tokens, **style),
        suffix=suffix,
        max_target_tokens=max_target_tokens or positions,
        special_ids=frozenset(special | set(prompt) | set(languages)),
        # What the vocabulary lacks is a gap in a text.
        never_ids=frozenset(
            (special | set(languages)) - {*eos_ids, getattr(tokenizer, "unk_token_id", None)}
            if tokenizer is not None
            else ()
        ),
        languages=languages,
        no_speech_id=config.no_timestamps_token_id - 1 if kind == "whisper" else None,
        by_length=kind in SEES_PADDING if by_length is None else by_length,
    )


def end_ids(model: Any) -> tuple[int, ...]:
    """The ids that end a text of a generating model, wrapped or not.

    Raises:
        ValueError: when it says none.
    """
    model = bare(model)
    found = _ids(model, "eos_token_id")
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no eos_token_id in generation_config or config, so nobody knows where a "
            "label ends: set model.generation_config.eos_token_id"
        )
    return found


def _ids(model: Any, name: str) -> tuple[int, ...]:
    """One id or several from the generation config, else from the config."""
    found = getattr(model.generation_config, name, None)
    if found is None:
        found = getattr(model.config, name, None)
    if found is None:
        return ()
    return tuple(int(i) for i in found) if isinstance(found, (list, tuple)) else (int(found),)


def _positions(model: Any) -> int | None:
    """Positions of the decoder; None where it has no limit (T5's are relative)."""
    if "t5" in str(model.config.model_type):
        return None
    parts = (model.config, getattr(model.config, "decoder", None))
    found = (getattr(part, name, None) for part in parts for name in POSITIONS)
    return next((int(count) for count in found if isinstance(count, int)), None)


def _prompt(model: Any, kind: str, tokenizer: Any, language: str | None) -> tuple[int, ...]:
    """The start token, and the token that generation is forced to begin with, such as a language."""
    start = decoder_start(model)
    forced = _ids(model, "forced_bos_token_id")
    if language is not None:
        forced = (_language_id(model, tokenizer, language),)
        if wraps_last_token(model) and start not in _ids(model, "eos_token_id"):
            # Here the language itself is what the decoder starts with.
            return forced
    if (kind in MANY_LANGUAGES or (kind == "mbart" and start in _ids(model, "eos_token_id"))) and not forced:
        raise ValueError(
            f"{type(model).__name__} writes many languages: say which, by language=, or by "
            "model.generation_config.forced_bos_token_id"
        )
    return (start, *forced)


def _language_id(model: Any, tokenizer: Any, language: str) -> int:
    known = getattr(model.generation_config, "text_decoder_lang_to_code_id", None)
    if known is not None:
        if language not in known:
            raise ValueError(f"language {language!r} is not one of {', '.join(sorted(known))}")
        return int(known[language])
    if tokenizer is None:
        raise ValueError(f"language={language!r} needs processing_class=, the tokenizer that knows its id")
    try:
        by_code = getattr(tokenizer, "get_lang_id", None)
        found = by_code(language) if by_code is not None else tokenizer.convert_tokens_to_ids(language)
    except KeyError:
        found = None
    if found is None or found == getattr(tokenizer, "unk_token_id", None):
        raise ValueError(f"{type(tokenizer).__name__} knows no language {language!r}")
    return int(found)


def _whisper_prompt(model: Any, language: str | None, task: str | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """`<sot> <language> <task> <notimestamps>`, for English-only models without the two in the middle; and languages.

    Raises:
        ValueError: for a language or task that the model does not know, or a generation config without ids for them.
    """
    config = model.generation_config
    if getattr(config, "return_timestamps", False):
        raise ValueError(
            "model.generation_config.return_timestamps is on, and labels have no times: their prompt says "
            "<|notimestamps|>, and longer audio than the window is an error. Set it to False"
        )
    start, plain = decoder_start(model), getattr(config, "no_timestamps_token_id", None)
    if plain is None:
        raise ValueError(
            "model.generation_config has no no_timestamps_token_id, so Whisper's prompt is unknown: load it from a "
            "Whisper checkpoint (GenerationConfig.from_pretrained)"
        )
    if not getattr(config, "is_multilingual", hasattr(config, "lang_to_id")):
        if language is not None or task is not None:
            raise ValueError(f"this Whisper knows English only: leave out language={language!r} and task={task!r}")
        return (start, plain), ()
    codes: dict[str, int] = config.lang_to_id
    tasks: dict[str, int] = config.task_to_id
    task = task or "transcribe"
    if task not in tasks:
        raise ValueError(f"task must be one of {', '.join(tasks)}, got {task!r}")
    if language is None:
        return (start, next(iter(codes.values())), tasks[task], plain), tuple(codes.values())
    named = language.lower().removeprefix("<|").removesuffix("|>")
    code = f"<|{TO_LANGUAGE_CODE.get(named, named)}|>"
    if code not in codes:
        raise ValueError(f"language {language!r} is not known to this Whisper, which knows {', '.join(codes)}")
    return (start, codes[code], tasks[task], plain), ()
