"""What is written is what the model says of each row alone."""

from __future__ import annotations

import json
import logging
import math
import shutil
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_dataset
from label_inputs import speech_rows
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC, Wav2Vec2Processor

from hf_ema_scaling.data.bad_items import BadItemError
from hf_ema_scaling.data.speech import build_character_processor
from hf_ema_scaling.labelling import Head, head_of, label_dataset
from hf_ema_scaling.labelling.inputs import Prepared, batches
from hf_ema_scaling.labels import PseudoLabel


def labels_of(folder: Path) -> Any:
    return load_dataset(str(folder), split="train")


def alone(head: Head, row: dict[str, Any]) -> tuple[list[int], float]:
    """Ids and confidence by a loop over the frames of one row."""
    features = head.processing_class(torch.tensor(row["audio"]["array"]).numpy(), sampling_rate=16_000)
    with torch.no_grad():
        logits = head.model(input_features=torch.tensor(features["input_features"][0])[None]).logits[0]
    path = [int(frame.argmax()) for frame in logits]
    ids = [token for token, _ in groupby(path) if token not in (0, 2)]
    best = [float(frame.log_softmax(-1).max()) for frame in logits]
    return ids, math.exp(sum(best) / len(best))


def test_every_row_has_the_label_it_has_alone(speech_head: Head, speech_data: Dataset, tmp_path: Path) -> None:
    summary = label_dataset(speech_head, speech_data, tmp_path / "out", keep=["id"], batch_size=3.0, shard_rows=4)
    found = labels_of(tmp_path / "out")
    assert found.column_names == [
        *("id", "row", "label", "label_ids", "label_values", "confidence", "reason", "scores", "seconds")
    ]
    assert found["id"][:] == [f"u{row}" for row in range(9)] and found["row"][:] == list(range(9))
    tokenizer = speech_head.processing_class.tokenizer
    vocabulary = {value: key for key, value in tokenizer.get_vocab().items()}
    for row, label in zip(speech_data, found, strict=True):
        ids, confidence = alone(speech_head, row)
        assert label["label_ids"] == ids
        assert label["label"] == "".join(vocabulary[i] for i in ids).replace("|", " ").strip()
        assert label["confidence"] == pytest.approx(confidence, abs=1e-4)
        assert label["seconds"] == pytest.approx(len(row["audio"]["array"]) / 16_000)
        assert label["reason"] is None
        scores = json.loads(label["scores"])
        assert scores["log_probability"] == pytest.approx(math.log(confidence), abs=1e-4)
    assert len({label for label in found["label"]}) > 5
    assert speech_head.decode(PseudoLabel((3, 3, 1, 4), 1.0)) == "aa b"
    assert summary.rows == {"kept": 9} and summary.sizes["kept"] == pytest.approx(sum(found["seconds"]), rel=1e-5)
    files = sorted(path.name for path in (tmp_path / "out" / "data").iterdir())
    assert files == ["train-00000.parquet", "train-00001.parquet", "train-00002.parquet"]


def test_dropped_rows_stay_with_their_reason(
    speech_head: Head, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = speech_rows(8)
    rows[0]["audio"]["array"] = [0.0] * 8000
    rows[2]["audio"]["array"] = rows[2]["audio"]["array"][:1600]
    rows[3]["audio"]["array"] = [math.nan] * 100
    rows[5]["audio"]["sampling_rate"] = 0
    rows[6]["audio"]["array"] = rows[6]["audio"]["array"] * 9
    data = Dataset.from_list(rows)
    with pytest.raises(BadItemError, match="row 4: audio array: 100 samples are NaN"):
        label_dataset(speech_head, data, tmp_path / "out", min_seconds=0.2, max_seconds=5.0)
    with caplog.at_level(logging.WARNING):
        # Labels do not depend on the choice, so it may change between runs.
        summary = label_dataset(
            speech_head, data, tmp_path / "out", min_seconds=0.2, max_seconds=5.0, on_bad_item="skip"
        )
    assert "skipped 2 of 8 rows (1 bad_rate, 1 not_finite); first: row 4: audio array" in caplog.text
    found = labels_of(tmp_path / "out")
    reasons = ["silent", None, "too_short", "not_finite", None, "bad_rate", "too_long", None]
    assert found["reason"][:] == reasons
    dropped = [number for number, reason in enumerate(reasons) if reason]
    assert all(found[number]["label"] == "" and found[number]["confidence"] == 0 for number in dropped)
    assert summary.rows == {"kept": 3, "silent": 1, "too_short": 1, "not_finite": 1, "bad_rate": 1, "too_long": 1}
    assert summary.sizes["silent"] == pytest.approx(0.5) and summary.sizes["not_finite"] == 0.0
    table = [line.split() for line in summary.table().splitlines()]
    assert table[0] == ["rows", "seconds"] and table[1][:2] == ["kept", "3"] and table[-1][:2] == ["total", "8"]
    assert ["silent", "1", "0.5"] in table


def test_raising_the_threshold_never_keeps_more(speech_head: Head, speech_data: Dataset, tmp_path: Path) -> None:
    label_dataset(speech_head, speech_data, tmp_path / "all")
    confidences = sorted(labels_of(tmp_path / "all")["confidence"])
    for kept in (0, 4, 8):
        threshold = (confidences[8 - kept] + confidences[9 - kept]) / 2 if kept else 1.0
        summary = label_dataset(speech_head, speech_data, tmp_path / str(kept), min_confidence=threshold)
        found = labels_of(tmp_path / str(kept))
        assert summary.rows.get("kept", 0) == kept and summary.rows["confidence"] == 9 - kept
        assert all((label["reason"] is None) == (label["confidence"] >= threshold) for label in found)
        assert all(found["label"])


def test_the_record_says_where_labels_come_from(average_folder: Path, speech_data: Dataset, tmp_path: Path) -> None:
    label_dataset(average_folder, speech_data.select(range(2)), tmp_path / "out", data_name="corpus", device="cpu")
    record = json.loads((tmp_path / "out" / "labelling.json").read_text())
    assert record["complete"] and record["model"]["name"] == str(average_folder)
    assert record["model"]["average"] == {"num_updates": 0, "state": {"clock": 12.5, "momentum": 0.999}}
    assert record["data"]["name"] == "corpus" and record["data"]["rows"] == 2
    assert record["summary"]["reasons"]["kept"]["rows"] == 2
    assert record["arguments"]["batch_size"] == 240.0
    assert set(record["time"]) == {"started", "finished"}


def test_no_labels_claim_what_a_damaged_record_says(
    average_folder: Path, speech_data: Dataset, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(average_folder, tmp_path / "copy"))
    path = copy / "ema_state.json"
    path.write_text(path.read_text().replace("0.999", "0.991"))
    with pytest.raises(ValueError, match=r"copy is damaged: ema_state\.json is not as it was written"):
        label_dataset(copy, speech_data.select(range(2)), tmp_path / "out", data_name="corpus", device="cpu")
    assert not (tmp_path / "out" / "labelling.json").exists()


def test_another_weight_another_fingerprint(speech_head: Head, speech_data: Dataset, tmp_path: Path) -> None:
    from hf_ema_scaling.labelling.provenance import weights_fingerprint

    before = weights_fingerprint(speech_head.model)
    bias = speech_head.model.ctc_head.bias
    kept = bias.detach().clone()
    with torch.no_grad():
        bias[3] = torch.nextafter(bias[3], torch.tensor(9.0))
    try:
        assert weights_fingerprint(speech_head.model) != before
    finally:
        with torch.no_grad():
            bias.copy_(kept)
    assert weights_fingerprint(speech_head.model) == before


def test_classes_of_texts(text_head: Head, tmp_path: Path) -> None:
    texts = ["a good film", "bad", None, "film film film film", " ", "very long words " * 20]
    summary = label_dataset(
        text_head, Dataset.from_dict({"text": texts}), tmp_path / "out", batch_size=12, on_bad_item="skip"
    )
    found = labels_of(tmp_path / "out")
    assert found["reason"][:] == [None, None, "no_text", None, "empty_text", None]
    assert summary.unit == "tokens" and summary.rows == {"kept": 4, "no_text": 1, "empty_text": 1}
    for text, label in zip(texts, found, strict=True):
        if label["reason"]:
            continue
        encoded = text_head.processing_class([text], truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            probabilities = text_head.model(**encoded).logits[0].softmax(-1)
        assert label["label"] == ["neg", "pos", "none"][int(probabilities.argmax())]
        assert label["label_ids"] == [int(probabilities.argmax())]
        assert label["label_values"] == pytest.approx(probabilities.tolist(), abs=1e-5)
        assert label["tokens"] == encoded["input_ids"].shape[1]
        assert label["text"] == text


def test_batches_are_bounded_and_sorted() -> None:
    rows = [Prepared({}, length, length / 10) for length in (5, 30, 7, 30, 100, 6, 5)]
    found = list(batches(rows, 6.0, same_length=False))
    assert found == [[4], [1, 3], [2, 5, 0, 6]]
    assert list(batches(rows, 6.0, same_length=True)) == [[4], [1, 3], [2], [5], [0, 6]]
    assert list(batches([], 6.0, same_length=False)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be above 0, got 0"),
        ({"shard_rows": 0}, "shard_rows must be above 0"),
        ({"min_confidence": 1.5}, "min_confidence must lie in"),
        ({"on_bad_item": "drop"}, "on_bad_item must be raise or skip, got 'drop'"),
        ({"column": "sound"}, "no column sound in the data set: it has audio, id, text"),
        ({"keep": ["nothing"]}, "no column nothing in the data set"),
    ],
)
def test_refused(
    speech_head: Head, speech_data: Dataset, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        label_dataset(speech_head, speech_data, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_names_of_the_labels_columns_cannot_be_kept(speech_head: Head, speech_data: Dataset, tmp_path: Path) -> None:
    data = speech_data.rename_column("id", "reason")
    with pytest.raises(ValueError, match="columns reason cannot be kept"):
        label_dataset(speech_head, data, tmp_path / "out", keep=["reason"])
    with pytest.raises(ValueError, match="no rows"):
        label_dataset(speech_head, speech_data.select([]), tmp_path / "none")


def test_the_hidden_text_is_not_read(speech_head: Head, speech_data: Dataset, tmp_path: Path) -> None:
    outputs = []
    for name, texts in (("one", ["x"] * 9), ("two", ["other"] * 9)):
        data = Dataset.from_dict({"audio": speech_data["audio"][:], "text": texts})
        label_dataset(speech_head, data, tmp_path / name)
        outputs.append((tmp_path / name / "data" / "train-00000.parquet").read_bytes())
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_models_without_a_mask_see_no_padding(norm: str, speech_data: Dataset, tmp_path: Path) -> None:
    """Their feature extractors make none (wav2vec2-base), so only rows of one length share a batch."""
    torch.manual_seed(0)
    processor = build_character_processor("abcdef")
    config = Wav2Vec2Config(
        vocab_size=len(processor.tokenizer),
        pad_token_id=0,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        conv_dim=(6, 6),
        conv_kernel=(160, 4),
        conv_stride=(160, 4),
        num_feat_extract_layers=2,
        feat_extract_norm=norm,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        initializer_range=1.0,
    )
    model = Wav2Vec2ForCTC(config).eval()
    extractor = Wav2Vec2FeatureExtractor()
    assert not extractor.return_attention_mask
    head = head_of(model, Wav2Vec2Processor(extractor, processor.tokenizer))
    label_dataset(head, speech_data, tmp_path / "out")
    found = labels_of(tmp_path / "out")
    for row, label in zip(speech_data, found, strict=True):
        values = extractor(torch.tensor(row["audio"]["array"]).numpy(), sampling_rate=16_000)["input_values"][0]
        with torch.no_grad():
            logits = model(torch.tensor(values)[None]).logits[0]
        best = [float(frame.log_softmax(-1).max()) for frame in logits]
        assert label["confidence"] == pytest.approx(math.exp(sum(best) / len(best)), rel=1e-4)
        assert label["label_ids"] == [i for i, _ in groupby(logits.argmax(-1).tolist()) if i not in (0, 2)]
