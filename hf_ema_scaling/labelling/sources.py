"""Data to label, from the same places as data to train on, or streamed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset

from hf_ema_scaling.data.bad_items import BadItemError
from hf_ema_scaling.labelling.heads import COLUMNS, SPEECH, WORDS
from hf_ema_scaling.labelling.judge import TEXT_COLUMNS
from hf_ema_scaling.recipe.sources import load_rows, load_speech


def open_data(
    source: str,
    kind: str,
    *,
    column: str | None = None,
    keep: Sequence[str] | None = None,
    streaming: bool = False,
    on_bad_item: str = "raise",
) -> Dataset | IterableDataset:
    """The data set to label. Labels that it may have are not read, unless `keep` names them.

    Args:
        source: a manifest, an audio folder, a saved data set, `owner/name:split` or `owner/name:config:split`; as in
            the recipes. Streamed: a name on the Hub, or a folder of files that `load_dataset` knows, with `:split`
            unless it is `train`.
        kind: of the head, see `Head`.
        column: with what the model reads; that of `COLUMNS` when None.
        keep: columns to keep.
        streaming: whether rows are fetched as they are labelled.
        on_bad_item: `raise` or `skip` lines of a manifest that are no rows.

    Raises:
        FileNotFoundError, ValueError: for a source that cannot be used.
    """
    name = column or COLUMNS[kind]
    if streaming:
        return _streamed(source)
    others = [other for other in keep or () if other != name]
    if kind == SPEECH:
        return load_speech(source, audio_column=name, text_column=None, keep=others, on_bad_item=on_bad_item)

    def check(row: Mapping[str, Any]) -> dict[str, Any]:
        """A text, or a list of texts; what else is wrong with it is seen when it is labelled."""
        value = row[name]
        words = kind == WORDS
        texts = value if words and isinstance(value, list) else [value]
        if value is not None and not (
            isinstance(value, list if words else str) and all(isinstance(one, str | None) for one in texts)
        ):
            raise BadItemError(f"{name} is {value!r:.60}, not {'a list of words' if words else 'a string'}", "no_text")
        if any("\ud800" <= character <= "\udfff" for one in texts for character in one or ""):
            raise BadItemError(f"{name} has a lone surrogate, which is half of a character", "not_utf8")
        return dict(row)

    return load_rows(source, [name, *others], on_bad_item=on_bad_item, check=check)


def open_labelled(
    source: str, kind: str, column: str | None, text_column: str | None, on_bad_item: str = "raise"
) -> Dataset | IterableDataset:
    """Rows with their text, on which filters find their limits.

    Args:
        source: as for `open_data`.
        kind: of the head.
        column: with what the model reads.
        text_column: with the text; that of `TEXT_COLUMNS` when None.
        on_bad_item: `raise` or `skip` lines of a manifest that are no rows.

    Raises:
        FileNotFoundError, ValueError: for a source that cannot be used, or a head whose filters are not fitted.
    """
    if kind not in TEXT_COLUMNS:
        raise ValueError(f"labelled={source!r} is for filters of labels that are text: leave it out")
    return open_data(source, kind, column=column, keep=[text_column or TEXT_COLUMNS[kind]], on_bad_item=on_bad_item)


def _streamed(source: str) -> IterableDataset:
    if Path(source).exists():
        place, rest = source, ["train"]
    elif Path(source.rpartition(":")[0]).is_dir() and source.rpartition(":")[0]:
        place, rest = source.rpartition(":")[0], [source.rpartition(":")[2]]
    else:
        place, *rest = source.split(":")
    if len(rest) not in (1, 2) or not all(rest):
        raise ValueError(f"{source!r}: a streamed source is owner/name:split or owner/name:config:split")
    if Path(place).is_file():
        raise ValueError(f"{source}: a file is not streamed; leave streaming out, its rows are not held in memory")
    try:
        return load_dataset(place, rest[0] if len(rest) == 2 else None, split=rest[-1], streaming=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: cannot be streamed ({error})") from error
