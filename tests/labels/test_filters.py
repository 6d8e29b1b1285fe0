"""Filters: what each drops and keeps, how recipes write them, and that the first one that fires gives the reason."""

from __future__ import annotations

import math
import zlib
from typing import Any

import pytest

from hf_ema_scaling.labels import PseudoLabel
from hf_ema_scaling.labels.filter_base import Row
from hf_ema_scaling.labels.filters import FILTERS, FilterChain, build_filters, read_filters
from hf_ema_scaling.labels.text_filters import longest_run, plain


def decode(ids: Any) -> str:
    """Ids are code points."""
    return "".join(map(chr, ids))


def ids(text: str) -> tuple[int, ...]:
    return tuple(map(ord, text))


def row(
    text: str = "a b", *, seconds: float = 1.0, source: str = "x y", confidence: float = 0.5, **scores: float
) -> Row:
    label = PseudoLabel(ids(text), confidence, scores=scores)
    return Row(label, decode=decode, seconds=seconds, source_ids=ids(source))


def drops(name: str, arguments: dict[str, Any], one: Row) -> bool:
    (built,) = build_filters({name: arguments})
    assert built.reason == name.partition("_quantile")[0].partition("_adaptive")[0]
    return built.drops(one)


@pytest.mark.parametrize(
    ("name", "arguments", "dropped", "kept"),
    [
        ("empty", {}, row(" "), row("a")),
        ("too_long", {"maximum": 3}, row("abcd"), row("abc")),
        ("duration", {"minimum": 1.0}, row(seconds=0.99), row(seconds=1.0)),
        ("duration", {"maximum": 20.0}, row(seconds=20.01), row(seconds=20.0)),
        ("rate", {"max_characters": 5}, row("abcdefghijk", seconds=2), row("abcdefghij", seconds=2)),
        ("rate", {"min_characters": 5}, row("abcdefghi", seconds=2), row("abcdefghij", seconds=2)),
        ("rate", {"max_words": 1.5}, row("a b c d", seconds=2), row("a b c", seconds=2)),
        ("rate", {"min_words": 1.5}, row("a b", seconds=2), row("a b c", seconds=2)),
        ("rate", {"max_characters": 5}, row("a", seconds=0), row("", seconds=0)),
        ("repeat", {}, row("so it is is is is is"), row("so it is is is is")),
        ("repeat", {"maximum": 2}, row("go on go on go on"), row("go on and go on and")),
        ("repeat", {}, row("a b c d e " * 5), row("a b c d e " * 2)),
        ("repeat", {"min_unique": 0.5}, row("a b a c a b c a b a b c"), row("a b c d a b c e f g a b")),
        ("long_word", {}, row("a " + "b" * 25), row("a " + "b" * 24)),
        ("compression", {}, row("no " * 40), row("the quick brown fox jumps over the lazy dog")),
        ("phrase", {}, row("Thank you for watching!"), row("thank you for watching the house")),
        ("phrase", {"phrases": ["Untertitel: (ZDF)"]}, row("untertitel zdf"), row("thank you")),
        ("no_eos", {}, row(ended=0.0), row(ended=1.0)),
        ("no_speech", {}, row(no_speech=0.61), row(no_speech=0.6)),
        ("length_ratio", {"maximum": 2.0}, row("abcdefg", source="xyz"), row("abcdef", source="xyz")),
        ("length_ratio", {"minimum": 0.5}, row("a", source="xyz"), row("ab", source="xyz")),
        ("copy", {}, row("Hello, world", source="hello world."), row("bonjour monde", source="hello world")),
        ("logprob", {}, row(log_probability=-1.01), row(log_probability=-1.0)),
        ("logprob", {}, row(log_probability=math.nan), row(log_probability=0.0)),
        ("entropy", {"maximum": 0.7}, row(entropy=0.71), row(entropy=0.7)),
        ("disagree", {}, row(disagreement=0.11), row(disagreement=0.1)),
        ("confidence", {"minimum": 0.5}, row(confidence=0.49), row(confidence=0.5)),
    ],
)
def test_what_is_dropped_and_what_is_just_kept(name: str, arguments: dict[str, Any], dropped: Row, kept: Row) -> None:
    assert drops(name, arguments, dropped) and not drops(name, arguments, kept)


ARGUMENTS: dict[str, dict[str, Any]] = {
    "too_long": {"maximum": 3},
    "entropy": {"maximum": 1.0},
    "confidence": {"minimum": 0.5},
    "confidence_quantile": {"share": 0.1},
    "logprob_quantile": {"share": 0.1},
    "confidence_adaptive": {"classes": 3},
}


def test_no_filter_stumbles_over_an_empty_text() -> None:
    """Peers crash on it."""
    scores = {"ended": 1.0, "no_speech": 0.0, "log_probability": 0.0, "entropy": 0.0, "disagreement": 0.0}
    for name in FILTERS.keys() - {"confidence_adaptive"}:
        empty = row("", seconds=0.0, source="", **scores)
        assert drops(name, ARGUMENTS.get(name, {}), empty) is (name == "empty"), name


def test_repetitions_in_a_row() -> None:
    assert [longest_run(text.split(), 3) for text in ("", "a", "a b a b a", "a a b b b", "a b c a b c a b")] == [
        0,
        1,
        2,
        3,
        2,
    ]
    # Of four words in a row no shorter n-gram repeats.
    assert longest_run(list("abcdabcd"), 3) == 1 and longest_run(list("abcdabcd"), 4) == 2


def test_the_compression_ratio_is_whispers() -> None:
    text = "yes and no " * 9
    ratio = len(text.strip().encode()) / len(zlib.compress(text.strip().encode()))
    assert not drops("compression", {"maximum": ratio}, row(text)) and drops(
        "compression", {"maximum": ratio - 1e-6}, row(text)
    )


def test_plain_text() -> None:
    assert plain(" [Musik],  Straße-2! ") == "musik strasse 2" and plain("...") == ""


def test_the_first_filter_that_fires_gives_the_reason() -> None:
    chain = FilterChain(build_filters({"long_word": {"maximum": 3}, "too_long": {"maximum": 5}}))
    texts = ["abcd efg", "ab cd ef", "ab", "abcdefgh"]
    labels = [PseudoLabel(ids(text), 0.5) for text in texts]
    labels += [
        PseudoLabel(ids("abcdefgh"), 0.5, "confidence"),
        PseudoLabel((), 0.9),
        PseudoLabel((), 0.9, None, (0.3,)),
    ]
    asked = []

    def known(number: int) -> Row:
        asked.append(number)
        return Row(labels[number], decode=decode)

    judged = chain.judge(labels, known)
    assert [one.reason for one in judged] == ["long_word", "too_long", None, "long_word", "confidence", "empty", None]
    # Nobody looks at rows without a label, or that were dropped before.
    assert asked == [0, 1, 2, 3, 6] and chain.reasons == ("long_word", "too_long")
    assert [one.ids for one in judged] == [one.ids for one in labels]


class Mine:
    reason = "mine"

    def drops(self, row: Row) -> bool:
        return row.words[0] == "b"


def test_a_filter_of_ones_own_brings_its_reason() -> None:
    labels = [PseudoLabel(ids("a"), 1.0), PseudoLabel(ids("b c"), 1.0)]
    judged = FilterChain([Mine()]).judge(labels, lambda number: Row(labels[number], decode=decode))
    assert [one.reason for one in judged] == [None, "mine"]


def test_recipes_write_filters_as_json_in_their_order() -> None:
    built = build_filters('{"repeat": null, "compression": {"maximum": 2.0}, "confidence_adaptive": {}}', classes=7)
    assert [one.reason for one in built] == ["repeat", "compression", "confidence"]
    assert built[1] == FILTERS["compression"](maximum=2.0) and built[2].classes == 7  # type: ignore[attr-defined]
    fitted = build_filters({"rate": "fit"}, fit=lambda: {"rate": {"max_characters": 11.0}})
    assert fitted == [FILTERS["rate"](max_characters=11.0)]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("repeat", "is no JSON"),
        ("[1]", "must be a mapping of names to arguments"),
        ({"repeats": {}}, "no filter is called 'repeats'; did you mean repeat"),
        ({"rate": {"max_character": 3}}, "the filter rate has no argument 'max_character'; did you mean max_char"),
        ({"no_eos": {"x": 3}}, "the filter no_eos has no argument 'x'; it takes none"),
        ({"too_long": {}}, "the filter too_long do not fit: .*missing"),
        ({"rate": {"min_words": 3, "max_words": 2}}, "min_words=3 is above max_words=2: nothing would be kept"),
        ({"copy": {"maximum": 2}}, "copy: maximum must lie in .0, 1., got 2"),
        ({"confidence_quantile": {"share": 1.0}}, r"share, of labels to drop, must lie in \[0, 1\), got 1.0"),
        ({"confidence_adaptive": {"momentum": 1.0}}, r"momentum of a threshold must lie in \[0, 1\), got 1.0"),
        ({"compression": "fit"}, "arguments of the filter compression must be a mapping, got 'fit'"),
        ({"rate": 3}, "must be a mapping, or 'fit' to find them on labelled data, got 3"),
        ({"phrase": {"phrases": "thanks"}}, "must be a list of texts, got 'thanks'"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(written: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_filters(written)


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match="the filter length_ratio cannot be fitted"):
        build_filters({"length_ratio": "fit"}, fit=lambda: {"rate": {}})


def test_what_a_row_does_not_have_is_asked_for() -> None:
    bare = Row(PseudoLabel((1,), 0.5, scores={"blank": 0.1}))
    for ask, message in (
        (lambda: bare.text, "pass decode"),
        (lambda: bare.seconds, "add a duration column"),
        (lambda: bare.source_text, "pass decode"),
        (lambda: bare.source_ids, "has none .input_ids."),
        (
            lambda: bare.score("entropy"),
            r"the score 'entropy', which this labeler does not give \(its scores: blank\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            ask()
