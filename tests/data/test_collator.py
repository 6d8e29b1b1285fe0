from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import ParakeetFeatureExtractor, Wav2Vec2FeatureExtractor, default_data_collator

from hf_ema_scaling.data.collator import CTCCollator, MicroBatchCollator, TwoSourceDataset, pad_labels
from hf_ema_scaling.data.sampler import Draw, ScheduledBatchSampler
from hf_ema_scaling.data.stream import LABELLED, UNLABELLED, DataSource, ReferenceStream
from hf_ema_scaling.scaling import BatchSchedule, step_borders


def speech(items: int, seed: int, *, labels: bool = True) -> list[dict[str, Any]]:
    """Rows of 1 to 9 frames of 2 features, and 1 to 4 labels."""
    rng = np.random.default_rng(seed)
    rows = []
    for row in range(items):
        features = rng.normal(size=(int(rng.integers(1, 10)), 2)).astype(np.float32)
        target = rng.integers(1, 30, size=int(rng.integers(1, 5))).tolist()
        rows.append(
            {"input_features": features.tolist(), "text": f"row {row}"} | ({"labels": target} if labels else {})
        )
    return rows


class Counting:
    """Rows, and the lists of indices they were asked for."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.asked: list[list[int]] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        self.asked.append(indices)
        return [self.rows[index] for index in indices]


DRAWS = [
    Draw(LABELLED, 2, 10, 0, 1.0),
    Draw(LABELLED, 0, 13, 0, 1.0),
    Draw(LABELLED, 4, 11, 1, 1.0),
    Draw(UNLABELLED, 1, 12, 2, 1.0),
    Draw(UNLABELLED, 3, 14, 2, 1.0),
    Draw(UNLABELLED, 1, 12, 3, 0.0),
]


def test_micro_batches_are_padded_one_by_one_and_say_what_they_hold() -> None:
    labelled, unlabelled = speech(5, 0), speech(6, 1, labels=False)
    dataset = TwoSourceDataset(labelled, unlabelled, keep=["input_features", "labels"])
    batches = MicroBatchCollator(CTCCollator())(dataset.__getitems__(DRAWS))["micro_batches"]
    assert [batch["source"] for batch in batches] == [LABELLED, LABELLED, UNLABELLED, UNLABELLED]
    assert [batch["positions"] for batch in batches] == [[10, 13], [11], [12, 14], [12]]
    assert [batch["indices"] for batch in batches] == [[2, 0], [4], [1, 3], [1]]
    assert [batch["weight"] for batch in batches] == [1, 1, 1, 0]
    assert not any("example_weights" in batch for batch in batches)
    for batch in batches:
        rows = [(labelled, unlabelled)[batch["source"]][index] for index in batch["indices"]]
        frames = [len(row["input_features"]) for row in rows]
        assert batch["inputs"]["input_features"].shape == (len(rows), max(frames), 2)
        assert batch["inputs"]["attention_mask"].sum(1).tolist() == frames
        for row, padded in zip(rows, batch["inputs"]["input_features"], strict=True):
            assert (padded[: len(row["input_features"])].numpy() == np.float32(row["input_features"])).all()
        if batch["source"] == LABELLED:
            assert [[i for i in label.tolist() if i != -100] for label in batch["inputs"]["labels"]] == [
                row["labels"] for row in rows
            ]
        else:
            assert set(batch["inputs"]) == {"input_features", "attention_mask"}


def test_rows_are_collated_once_more_for_the_teacher() -> None:
    unlabelled = speech(6, 1, labels=False)
    dataset = TwoSourceDataset(speech(5, 0), unlabelled, keep=["input_features", "labels"])
    draws = [DRAWS[2], DRAWS[3]._replace(label_batch=1), DRAWS[4]._replace(label_batch=0), DRAWS[5]]
    draws.append(Draw(UNLABELLED, 5, 15, 4, 1.0, label_batch=1))
    found = MicroBatchCollator(CTCCollator())(dataset.__getitems__(draws))
    assert [batch["positions"] for batch in found["micro_batches"]] == [[11], [12, 14], [12], [15]]
    assert [batch["positions"] for batch in found["label_batches"]] == [[14], [12, 15]]
    assert [batch["indices"] for batch in found["label_batches"]] == [[3], [1, 5]]
    for batch in found["label_batches"]:
        assert set(batch["inputs"]) == {"input_features", "attention_mask"} and batch["source"] == UNLABELLED
        frames = [len(unlabelled[index]["input_features"]) for index in batch["indices"]]
        assert batch["inputs"]["attention_mask"].sum(1).tolist() == frames
        assert batch["inputs"]["input_features"].shape == (len(frames), max(frames), 2)


def test_the_collator_gives_trainer_no_labels_to_count() -> None:
    dataset = TwoSourceDataset(speech(5, 0), speech(6, 1))
    assert set(MicroBatchCollator(CTCCollator())(dataset.__getitems__(DRAWS))) == {"micro_batches"}


@pytest.mark.parametrize("column", ["labels", "label", "label_ids"])
@pytest.mark.parametrize("keep", [None, ["x", "labels", "label", "label_ids"]])
def test_labels_of_unlabelled_rows_are_never_present(column: str, keep: list[str] | None) -> None:
    rows = [{"x": [1.0], column: 7} for _ in range(6)]
    dataset = TwoSourceDataset(rows, rows, keep=keep)
    assert dataset[DRAWS[0]][1] == {"x": [1.0], column: 7}
    assert dataset[DRAWS[3]][1] == {"x": [1.0]}
    assert [set(row) for _, row in dataset.__getitems__(DRAWS)] == [{"x", column}] * 3 + [{"x"}] * 3
    # As ids of a sequence, which transformers renames to `labels`.
    as_ids = [{"x": [1.0], "label_ids": [3]} for _ in range(6)]
    batches = MicroBatchCollator(default_data_collator)(TwoSourceDataset(as_ids, as_ids).__getitems__(DRAWS))
    assert ["labels" in batch["inputs"] for batch in batches["micro_batches"]] == [True, True, False, False]


def test_labels_that_a_collator_makes_of_the_inputs_are_left_out_too() -> None:
    def language_model(rows: list[dict[str, Any]]) -> Mapping[str, Any]:
        ids = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": ids, "labels": ids.clone()}

    rows = [{"input_ids": [row, row]} for row in range(6)]
    batches = MicroBatchCollator(language_model)(TwoSourceDataset(rows, rows).__getitems__(DRAWS))["micro_batches"]
    assert [set(batch["inputs"]) for batch in batches[1:3]] == [{"input_ids", "labels"}, {"input_ids"}]
    assert batches[0]["inputs"]["labels"].tolist() == [[2, 2], [0, 0]]


def test_only_kept_columns_reach_the_collator() -> None:
    rows = speech(6, 0)
    keep = TwoSourceDataset(rows, rows, keep=["labels", "input_features", "absent"])
    assert set(keep[DRAWS[0]][1]) == {"input_features", "labels"}
    assert set(keep[DRAWS[3]][1]) == {"input_features"}
    everything = TwoSourceDataset(rows, rows)
    assert set(everything[DRAWS[0]][1]) == {"input_features", "labels", "text"}
    assert set(everything[DRAWS[3]][1]) == {"input_features", "text"}
    assert len(everything) == 12 and len(TwoSourceDataset(rows, None)) == 6


@pytest.mark.parametrize("kind", [Dataset.from_list, Counting, list])
def test_rows_fetched_together_are_the_rows_fetched_one_by_one(kind: Any) -> None:
    dataset = TwoSourceDataset(kind(speech(5, 0)), kind(speech(6, 1)), keep=["input_features", "labels"])
    together, apart = dataset.__getitems__(DRAWS), [dataset[draw] for draw in DRAWS]
    assert together == apart
    assert [draw for draw, _ in together] == DRAWS


def test_rows_of_one_source_are_fetched_in_one_access() -> None:
    labelled, unlabelled = Counting(speech(5, 0)), Counting(speech(6, 1))
    TwoSourceDataset(labelled, unlabelled).__getitems__(DRAWS)
    assert labelled.asked == [[2, 0, 4]] and unlabelled.asked == [[1, 3, 1]]


def test_a_loader_over_the_sampler_gives_each_step_its_rows() -> None:
    labelled, unlabelled = (Dataset.from_list(speech(items, seed)) for seed, items in enumerate((15, 22)))
    lengths = [np.array([len(row["input_features"]) for row in rows], dtype=float) for rows in (labelled, unlabelled)]
    stream = ReferenceStream(
        DataSource.of_samples(15, lengths[0]),
        unlabelled=DataSource.of_samples(22, lengths[1]),
        reference_batch_size=6,
        reference_steps=12,
        pl_start=4,
    )
    borders = step_borders(BatchSchedule.constant(18).resolve(12), 6, (4,))
    sampler = ScheduledBatchSampler(stream, borders, micro_batch_size=5)
    dataset = TwoSourceDataset(labelled, unlabelled, keep=["input_features", "labels"])
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=MicroBatchCollator(CTCCollator()))
    rows = (labelled, unlabelled)
    units, frames = [], []
    for batch in loader:
        micro_batches = batch["micro_batches"]
        units.append(sum(len(micro["indices"]) for micro in micro_batches))
        for micro in micro_batches:
            assert len(micro["indices"]) <= 5
            assert [stream.index[position] for position in micro["positions"]] == micro["indices"]
            features = [rows[micro["source"]][index]["input_features"] for index in micro["indices"]]
            frames.append(micro["inputs"]["attention_mask"].sum().item() - sum(map(len, features)))
            first = micro["inputs"]["input_features"][0, : len(features[0])]
            torch.testing.assert_close(first, torch.tensor(features[0]), rtol=0, atol=0)
    assert units == [18, 6, 18, 18, 12]
    assert set(frames) == {0}


@pytest.mark.parametrize("name", ["input_features", "input_values"])
def test_ctc_padding_mask_and_labels(name: str) -> None:
    shape = (2,) if name == "input_features" else ()
    rows = [
        {name: np.full((frames, *shape), frames, dtype=np.float64), "labels": labels}
        for frames, labels in ((2, [5, 6, 7]), (4, [8]), (1, [9, 3]))
    ]
    batch = CTCCollator(padding_value=-3.0)(rows)
    assert batch[name].shape == (3, 4, *shape) and batch[name].dtype == torch.float32
    column = batch[name][..., 0] if shape else batch[name]
    assert column.tolist() == [[2, 2, -3, -3], [4, 4, 4, 4], [1, -3, -3, -3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, -100, -100], [9, 3, -100]]
    assert batch["attention_mask"].dtype == batch["labels"].dtype == torch.int64
    assert set(CTCCollator(attention_mask=False)(rows)) == {name, "labels"}
    assert set(CTCCollator()([{name: row[name]} for row in rows])) == {name, "attention_mask"}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    rows = [{"input_values": [0.0, 1.0, 2.0]}, {"input_values": [0.0, value]}]
    with pytest.raises(ValueError, match="row 1 of the batch holds values in 'input_values' that are not finite"):
        CTCCollator()(rows)


def test_rows_without_speech_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'input_features' or 'input_values', got \['labels', 'text'\]"):
        CTCCollator()([{"text": "x", "labels": [1]}])


def test_pad_labels() -> None:
    assert pad_labels([[1, 2], [], [3]]).tolist() == [[1, 2], [-100, -100], [3, -100]]
    assert pad_labels([[], []]).tolist() == [[-100], [-100]]
    assert pad_labels([torch.tensor([4, 5])]).tolist() == [[4, 5]]
    assert pad_labels([[]]).dtype == torch.int64


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("extractor", "padding_value", "attention_mask"),
    [
        (Wav2Vec2FeatureExtractor(padding_value=0.5, return_attention_mask=False), 0.5, False),
        (Wav2Vec2FeatureExtractor(padding_value=0.0, return_attention_mask=True), 0.0, True),
        # Keeps the default of its base class.
        (ParakeetFeatureExtractor(padding_value=-1.0), -1.0, True),
        (object(), 0.0, True),
    ],
)
def test_from_processor(extractor: Any, padding_value: float, attention_mask: bool, wrapped: bool) -> None:
    processor = SimpleNamespace(feature_extractor=extractor) if wrapped else extractor
    collator = CTCCollator.from_processor(processor)
    assert (collator.padding_value, collator.attention_mask) == (padding_value, attention_mask)


def test_a_wav2vec2_batch_is_the_one_its_extractor_pads() -> None:
    extractor = Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True)
    rows = [{"input_values": np.linspace(0, 1, n, dtype=np.float32)} for n in (30, 50, 41)]
    expected = extractor.pad(rows, padding=True, return_tensors="pt")
    batch = CTCCollator.from_processor(extractor)(rows)
    assert batch.keys() == expected.keys()
    for name, value in batch.items():
        assert torch.equal(value, expected[name].to(value.dtype))


def test_columns_for_the_labeler_reach_it_from_unlabelled_rows_alone() -> None:
    rows = [{"input_ids": [1], "word_ids": [0], "labels": 2, "other": 3}]
    for keep in (["input_ids", "labels"], None):
        dataset = TwoSourceDataset(rows, rows, keep=keep, for_labeler=("word_ids",))
        kept = {"other"} if keep is None else set()
        assert set(dataset[Draw(LABELLED, 0, 0, 0, 1.0)][1]) == {"input_ids", "labels"} | kept
        assert set(dataset[Draw(UNLABELLED, 0, 0, 0, 1.0)][1]) == {"input_ids", "word_ids"} | kept
