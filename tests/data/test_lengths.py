from __future__ import annotations

import datasets
import numpy as np
import pyarrow as pa
import pytest

from hf_ema_scaling.data.lengths import holds_zeros, row_lengths

LENGTHS = [3, 1, 4, 1, 5, 9, 2, 6, 0]


def rows(kind: pa.DataType) -> datasets.Dataset:
    """Stored in three chunks, the last of which is a part of its array."""
    lists = [list(range(length)) for length in LENGTHS]
    chunks = [pa.array(lists[:4], kind), pa.array(lists[4:6], kind), pa.array([[7] * 30, *lists[6:]], kind).slice(1)]
    return datasets.Dataset(pa.table({"input_ids": pa.chunked_array(chunks)}))


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.large_list(pa.int64())])
def test_lengths_are_those_of_the_rows_in_their_order(kind: pa.DataType) -> None:
    data = rows(kind)
    orders = {
        "as stored": data,
        "select": data.select([5, 5, 0, 8]),
        "contiguous": data.select(range(3, 7)),
        "shuffle": data.shuffle(seed=1),
        "shuffle of shuffle": data.shuffle(seed=1).select([7, 2]).shuffle(seed=2),
        "concatenated": datasets.concatenate_datasets([data.select([2, 1]), data.shuffle(seed=3)]),
        "torch": data.shuffle(seed=4).with_format("torch"),
        "filtered": data.filter(lambda row: len(row["input_ids"]) > 2),
        "transformed": data.with_transform(lambda batch: {"input_ids": [[0]] * len(batch["input_ids"])}),
    }
    for name, chosen in orders.items():
        plain = chosen.with_format(None)
        found = row_lengths(chosen, "input_ids")
        assert found.tolist() == [len(ids) for ids in plain["input_ids"]], name
    assert row_lengths(data, "input_ids").tolist() == LENGTHS


def test_a_row_that_is_null_has_no_length() -> None:
    data = datasets.Dataset(pa.table({"input_ids": pa.array([[1, 2], None, [3]])}))
    assert row_lengths(data, "input_ids").tolist() == [2, 0, 1]


def test_arrays_have_the_lengths_of_their_first_dimension() -> None:
    features = datasets.Features({"x": datasets.Array2D(shape=(None, 2), dtype="float32")})
    data = datasets.Dataset.from_dict({"x": [np.zeros((n, 2)) for n in (3, 1, 2)]}, features=features)
    assert row_lengths(data.select([2, 0]), "x").tolist() == [2, 3]


def test_a_column_that_holds_no_lists_is_refused() -> None:
    data = datasets.Dataset.from_dict({"input_ids": ["one two"]})
    with pytest.raises(ValueError, match=r"the column 'input_ids' holds Value\('string'\), not lists"):
        row_lengths(data, "input_ids")


@pytest.mark.parametrize(("mask", "zeros"), [([[1, 1], [1]], False), ([[1], [1, 0]], True), ([[True], [False]], True)])
def test_zeros_of_a_mask(mask: list[list[int]], zeros: bool) -> None:
    assert holds_zeros(datasets.Dataset.from_dict({"attention_mask": mask}), "attention_mask") == zeros
    assert not holds_zeros(datasets.Dataset.from_dict({"attention_mask": [[]]}), "attention_mask")
