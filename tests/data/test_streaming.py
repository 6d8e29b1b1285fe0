"""Reading a stream: its order, its passes, its place and the way back to it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import streamed
import torch
from torch.utils.data import IterableDataset

from hf_ema_scaling.data.streaming import StreamError, StreamHead, StreamReader, is_stream, row_digest, split_by_shards

LOGGER = "hf_ema_scaling.data.streaming"


def names(reader: StreamReader, count: int) -> list[str]:
    return [reader.read()[1]["name"] for _ in range(count)]


def test_passes_follow_each_other_in_the_order_of_the_stream() -> None:
    source = streamed.Plain(streamed.rows(3))
    reader = StreamReader(source, "train_dataset")
    assert source.begun == 0
    assert [(number, row["name"]) for number, row in (reader.read() for _ in range(7))] == [
        (0, "a0"), (1, "a1"), (2, "a2"), (0, "a0"), (1, "a1"), (2, "a2"), (0, "a0")
    ]  # fmt: skip
    assert (reader.passes, reader.rows, source.given) == (2, 1, 7)


def test_each_pass_has_its_epoch() -> None:
    data = streamed.rows(6)
    reader = StreamReader(streamed.Permuted(data, 5, 0), "train_dataset")
    expected = [data[i]["name"] for epoch in range(3) for i in np.random.default_rng([5, 0, epoch]).permutation(6)]
    assert names(reader, 18) == expected
    assert expected[:6] != expected[6:12]


def test_the_order_is_that_of_the_user_shuffle() -> None:
    shuffled = streamed.stream(streamed.rows(9), shards=3).shuffle(seed=1, buffer_size=4)
    expected = [row["name"] for row in shuffled]
    assert names(StreamReader(shuffled, "train_dataset"), 9) == expected != [f"a{i}" for i in range(9)]


def test_a_row_that_is_looked_at_is_not_taken() -> None:
    source = streamed.Plain(streamed.rows(2))
    reader = StreamReader(source, "train_dataset")
    names(reader, 2)
    place = reader.place(verify=False)
    assert reader.peek()[1]["name"] == "a0"  # of the next pass
    assert reader.place(verify=False) == place == {"passes": 0, "rows": 2, "state": None, "next": None}
    assert names(reader, 3) == ["a0", "a1", "a0"]


class Stateful(IterableDataset[streamed.Row]):
    """With state of its own, as the stateful loaders want it."""

    def __init__(self, lies: bool = False, unfit: bool = False) -> None:
        self.at, self.start, self.lies, self.unfit, self.given = 0, 0, lies, unfit, 0

    def state_dict(self) -> dict[Any, Any]:
        return {0: self.at} if self.unfit else {"at": self.at + self.lies}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state.get("at", 0)

    def __iter__(self) -> Iterator[streamed.Row]:
        self.at, self.start = self.start, 0
        for item in streamed.rows(7)[self.at :]:
            self.at += 1
            self.given += 1
            yield item


def upper(row: streamed.Row) -> streamed.Row:
    return row | {"name": row["name"].upper()}


def batched(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {"name": [name for name in rows["name"] for _ in range(2)]}


def seven(shards: int = 1) -> Any:
    return streamed.stream(streamed.rows(7), shards)


PIPELINES: dict[str, tuple[Callable[[], Any], bool]] = {
    "plain": (seven, True),
    "shards": (lambda: streamed.of_shards([streamed.rows(4), streamed.rows(1, "b"), streamed.rows(3, "c")]), True),
    "map": (lambda: seven(2).map(upper).filter(lambda row: row["name"] != "A2"), True),
    "batched": (lambda: seven(2).map(batched, batched=True, batch_size=3, remove_columns=["size", "labels"]), True),
    "shuffled shards": (lambda: seven(7).shuffle(seed=3, buffer_size=1), True),
    "buffer": (lambda: seven(2).shuffle(seed=3, buffer_size=4), False),
    "torch": (lambda: streamed.Plain(streamed.rows(7)), False),
    "stateful": (Stateful, True),
    "lying": (lambda: Stateful(lies=True), False),
    "no JSON": (lambda: Stateful(unfit=True), False),
}


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("looked", [False, True])
def test_a_place_leads_back_to_the_next_row(name: str, looked: bool, caplog: pytest.LogCaptureFixture) -> None:
    """From every place of three passes, over JSON; without a second reading wherever the state suffices."""
    make, by_state = PIPELINES[name]
    straight = names(StreamReader(make(), "train_dataset"), 24)
    reader, found = StreamReader(make(), "train_dataset"), []
    for count in range(20):
        if looked:
            reader.peek()
        place = json.loads(json.dumps(reader.place(verify=True)))
        caplog.clear()
        with caplog.at_level(logging.WARNING, LOGGER):
            resumed = StreamReader(make(), "train_dataset")
            resumed.resume(place)
        assert names(resumed, 4) == straight[count : count + 4]
        found.append("once more" in caplog.text)
        reader.read()
    assert not any(found) if by_state else any(found)


def test_a_place_survives_a_resume_that_reads_nothing() -> None:
    reader = StreamReader(seven(2), "train_dataset")
    names(reader, 3)
    place = reader.place(verify=True)
    resumed = StreamReader(seven(2), "train_dataset")
    resumed.resume(place)
    again = StreamReader(seven(2), "train_dataset")
    again.resume(resumed.place(verify=True))
    assert names(again, 2) == ["a3", "a4"]


def test_a_data_set_is_left_as_it_was() -> None:
    """A reader neither moves the user's stream nor starts where another one has resumed."""
    data = seven()
    reader = StreamReader(data, "train_dataset")
    names(reader, 4)
    resumed = StreamReader(data, "train_dataset")
    resumed.resume(reader.place(verify=True))
    assert names(resumed, 1) == ["a4"]
    assert [row["name"] for row in data] == names(StreamReader(data, "train_dataset"), 7)


def test_two_readers_of_one_stream_do_not_meet() -> None:
    data = seven(7).shuffle(seed=1, buffer_size=1)
    alone = names(StreamReader(data, "train_dataset"), 21)
    first, second = StreamReader(data, "train_dataset"), StreamReader(data, "unlabeled_dataset")
    names(second, 8)  # a pass ahead
    both = [(names(first, 1)[0], names(second, 1)[0]) for _ in range(13)]
    assert [a for a, _ in both] == alone[:13] and [b for _, b in both] == alone[8:]


def test_streams_of_one_origin_keep_their_own_state(caplog: pytest.LogCaptureFixture) -> None:
    origin = streamed.of_shards([streamed.rows(12)])
    even, odd = (origin.filter(lambda row, rest=rest: row["labels"] % 2 == rest) for rest in (0, 1))
    first, second = StreamReader(even, "train_dataset"), StreamReader(odd, "unlabeled_dataset")
    names(first, 1)
    names(second, 4)
    names(first, 1)
    place = first.place(verify=True)
    StreamHead(origin, "train_dataset").at_most(1)
    with caplog.at_level(logging.WARNING, LOGGER):
        resumed = StreamReader(even, "train_dataset")
        resumed.resume(place)
    assert names(resumed, 3) == names(first, 3) == ["a4", "a6", "a8"] and not caplog.text


def test_other_rows_than_before_are_refused() -> None:
    reader = StreamReader(seven(), "train_dataset")
    names(reader, 3)
    place = reader.place(verify=True)
    changed = streamed.rows(7)
    changed[3]["size"] += 1
    with pytest.raises(StreamError, match=r"gives other rows than before the checkpoint: row 3 of pass 1 differs"):
        StreamReader(streamed.stream(changed), "train_dataset").resume(place)
    with pytest.raises(StreamError, match="other rows than before"):
        StreamReader(streamed.Plain(streamed.rows(2)), "train_dataset").resume(place | {"state": None})


def test_what_cannot_be_read_says_where() -> None:
    with pytest.raises(StreamError, match=r"^train_dataset is empty$"):
        StreamReader(streamed.Plain([]), "train_dataset").read()
    with pytest.raises(StreamError, match=r"train_dataset \(the shards of process 1\) is empty"):
        StreamReader(streamed.of_shards([streamed.rows(2), []]), "train_dataset", (1, 2)).read()
    broken = StreamReader(streamed.Plain([*streamed.rows(2), OSError("bad magic")]), "unlabeled_dataset")
    names(broken, 2)
    with pytest.raises(
        StreamError, match=r"unlabeled_dataset: row 2 \(from 0\) of pass 1 cannot be read \(OSError: bad"
    ):
        broken.read()
    once = StreamReader(streamed.Plain(iter(streamed.rows(2))), "train_dataset")  # type: ignore[arg-type]
    names(once, 2)
    with pytest.raises(StreamError, match="is empty in pass 2: can it be iterated more than once"):
        once.read()
    with pytest.raises(StreamError, match="row 0 is a list; a stream must yield rows one by one"):
        StreamReader(streamed.Plain([[1]]), "train_dataset").read()


def test_a_corrupt_row_in_a_map_has_its_number() -> None:
    def decode(row: streamed.Row) -> streamed.Row:
        if row["name"] == "a4":
            raise ValueError("not audio")
        return row

    reader = StreamReader(seven(2).map(decode), "train_dataset")
    with pytest.raises(StreamError, match=r"row 4 \(from 0\) of pass 1 cannot be read \(ValueError: not audio\)"):
        names(reader, 7)


def test_shards_go_to_processes_where_their_number_allows_it() -> None:
    data = seven(4)
    assert [split_by_shards(data, size) for size in (1, 2, 3, 4, 8)] == [False, True, False, True, False]
    assert not split_by_shards(streamed.Plain([]), 2) and not split_by_shards(streamed.rows(4), 2)
    found = [names(StreamReader(data, "train_dataset", (rank, 2)), 3) for rank in range(2)]
    assert not set(found[0]) & set(found[1])


def test_streams_are_known_and_their_first_rows_are_at_hand() -> None:
    assert is_stream(seven()) and is_stream(streamed.Plain([])) and not is_stream(streamed.rows(2))
    source = streamed.Plain(streamed.rows(5))
    head = StreamHead(source, "train_dataset")
    assert (head.at_most(2), head[1]["name"], source.given) == (2, "a1", 2)
    assert (head[3]["name"], source.given, head.at_most(9)) == ("a3", 4, 5)
    with pytest.raises(IndexError, match="row 7 of a stream of 5 rows"):
        head[7]


def test_the_digest_is_that_of_the_content() -> None:
    array = np.arange(6, dtype=np.float32)
    row = {"a": array, "b": [1, 2.5, None], "c": {"bytes": b"xyz"}, "d": torch.ones(2)}
    same = {"d": torch.ones(2), "c": {"bytes": b"xyz"}, "b": [1, 2.5, None], "a": array.copy()}
    assert row_digest(row) == row_digest(same)
    others: list[Any] = [
        row | {"a": array + 1},
        row | {"a": array.reshape(2, 3)},
        row | {"a": array.astype(np.float64)},
        row | {"b": [1, 2.5]},
        row | {"b": [1.0, 2.5]},
        row | {"b": [1.0, 3.5]},
        row | {"c": {"bytes": b"xyZ"}},
        row | {"d": torch.zeros(2)},
        {"e": row["a"], **{key: row[key] for key in "bcd"}},
    ]
    assert len({row_digest(other) for other in [row, *others]}) == 10
    assert row_digest({"x": object()}) == row_digest({"x": object()})  # never an address
