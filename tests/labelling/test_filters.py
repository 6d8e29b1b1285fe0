"""`label` drops what the filters of training would drop, with their reasons; limits come from labelled rows."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from label_inputs import RATE, speech_rows, waveform
from labelled_heads import CASES

from hf_ema_scaling.data.bad_items import BadItemError
from hf_ema_scaling.data.named_views import FixedView, with_second_view
from hf_ema_scaling.data.speech_views import AdditiveNoise
from hf_ema_scaling.labelling import Head, head_of, label_dataset, shards
from hf_ema_scaling.labels import PseudoLabel, Row, build_filters, fit_filters, two_views


def labelled(name: str, folder: Path, **options: Any) -> Any:
    case = CASES[name]
    label_dataset(case.make(), Dataset.from_list(case.rows()), folder, **options)
    return load_dataset(str(folder), split="train")


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "labelling.json").read_text())
    return found


def test_the_first_filter_that_fires_gives_the_reason(tmp_path: Path) -> None:
    plain = labelled("ctc", tmp_path / "plain")
    lengths = sorted(len(row["label"]) / row["seconds"] for row in plain)
    fast, sure = float(np.mean(lengths[-3:-1])), float(np.median(plain["confidence"]))
    tokens = sorted(len(ids) for ids in plain["label_ids"])[-3]
    written = {"rate": {"max_characters": fast}, "too_long": {"maximum": tokens}}
    found = labelled("ctc", tmp_path / "out", filters=written, min_confidence=sure)

    def reason(row: dict[str, Any]) -> str | None:
        if len(row["label"]) / row["seconds"] > fast:
            return "rate"
        if len(row["label_ids"]) > tokens:
            return "too_long"
        return "confidence" if row["confidence"] < sure else None

    expected = [reason(row) for row in plain]
    assert found["reason"][:] == expected and {"rate", "confidence", None} <= set(expected)
    # Dropped labels are written all the same.
    assert found["label_ids"][:] == plain["label_ids"][:]
    assert record(tmp_path / "out")["arguments"]["filters"] == [list(pair) for pair in written.items()]
    # In another order another filter is first, so the folder does not go on.
    with pytest.raises(ValueError, match=r"arguments\.filters was"):
        labelled("ctc", tmp_path / "out", filters=dict(reversed(written.items())), min_confidence=sure)


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("whisper", '{"no_speech": {"maximum": 0.03}, "logprob": {"minimum": -1.5}, "repeat": {}}'),
        ("t5", {"length_ratio": {"maximum": 0.12}, "copy": {"maximum": 0.3}, "logprob": {"minimum": -0.5}}),
        ("gpt2", {"length_ratio": {"maximum": 0.4}, "compression": {"maximum": 0.2}}),
        ("one-class", {"entropy": {"maximum": 0.5}, "confidence": {"minimum": 0.9}}),
        ("words", {"length_ratio": {"maximum": 0.7}, "confidence": {"minimum": 0.6}}),
    ],
)
def test_filters_of_every_kind_of_head(name: str, written: Any, tmp_path: Path) -> None:
    """Against the filters one row at a time, on what the labels of a run without filters say."""
    head = CASES[name].make()
    plain = labelled(name, tmp_path / "plain")
    found = labelled(name, tmp_path / "out", filters=written)
    expected = []
    for row, given in zip(plain, CASES[name].rows(), strict=True):
        label = PseudoLabel(
            tuple(row["label_ids"]), row["confidence"], row["reason"], scores=json.loads(row["scores"])
        )
        inputs = CASES[name].alone(head, given)
        asked = Row(
            label,
            decode=head.text,
            seconds=row.get("seconds"),
            source_ids=inputs["input_ids"][0].tolist() if "input_ids" in inputs else None,
        )
        reasons = [one.reason for one in build_filters(written) if one.drops(asked)]
        expected.append(row["reason"] or next(iter(reasons), None))
    assert found["reason"][:] == expected != plain["reason"][:]


def test_limits_come_from_labelled_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gold = [{"audio": row["audio"], "text": "ab " * (1 + number % 7)} for number, row in enumerate(speech_rows(24))]
    gold.append({"audio": {"array": waveform(0.5, 99).tolist(), "sampling_rate": 0}, "text": "ab"})
    rows = Dataset.from_list(gold)
    with pytest.raises(BadItemError, match="labelled row 25: audio array: a sampling rate of 0"):
        labelled("ctc", tmp_path / "raise", filters={"rate": "fit"}, labelled=rows)
    with caplog.at_level(logging.WARNING):
        found = labelled(
            "ctc", tmp_path / "out", filters={"rate": "fit"}, labelled=rows, on_bad_item="skip", min_confidence=0.1
        )
    seconds = [len(row["audio"]["array"]) / RATE for row in gold[:24]]
    limits = fit_filters([row["text"] for row in gold[:24]], seconds=seconds)["rate"]
    assert record(tmp_path / "out")["arguments"]["filters"] == [["rate", limits]]
    assert "limits found on 24 labelled rows" in caplog.text
    assert "labelled rows: skipped 1 of 25 rows (1 bad_rate); first: labelled row 25" in caplog.text
    for row in found:
        rate = len(row["label"]) / row["seconds"]
        words = len(row["label"].split()) / row["seconds"]
        inside = limits["min_characters"] <= rate <= limits["max_characters"]
        assert (row["reason"] == "rate") == (not inside or not limits["min_words"] <= words <= limits["max_words"])


@pytest.mark.parametrize(("name", "column"), [("mbart-50", "target"), ("gpt2", "completion")])
def test_ratios_of_texts_are_of_targets_over_sources(name: str, column: str, tmp_path: Path) -> None:
    case = CASES[name]
    read = next(iter(case.rows()[0]))
    rows = [{read: "abc" * (1 + number % 3), column: "ab" * (1 + number % 5)} for number in range(20)]
    gold = Dataset.from_list(rows)
    labelled(name, tmp_path / "out", filters={"length_ratio": "fit"}, labelled=gold)
    # A target of mBART is a language, letters and an end; of a causal model letters and an end. Its source ends, too.
    more = (2, 1) if name == "mbart-50" else (1, 0)
    tokens = [len(row[column]) + more[0] for row in rows]
    limits = fit_filters(None, tokens=tokens, source_tokens=[len(row[read]) + more[1] for row in rows])
    assert record(tmp_path / "out")["arguments"]["filters"] == [["length_ratio", limits["length_ratio"]]]


def test_quantiles_are_of_all_labels_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Dataset.from_list(speech_rows(12))
    head = CASES["ctc"].make()
    options: dict[str, Any] = {"filters": {"confidence_quantile": {"share": 0.4}}, "shard_rows": 4}
    label_dataset(head, rows, tmp_path / "out", **options)
    found = load_dataset(str(tmp_path / "out"), split="train")
    sure = np.array(found["confidence"])
    for shard in range(3):
        seen = np.sort(sure[: 4 * shard + 4])
        # The threshold is the lower edge of a bin that is 0.05 wide in log-odds.
        threshold = seen[int(0.4 * len(seen))]
        for place in range(4 * shard, 4 * shard + 4):
            if abs(np.log(sure[place] / (1 - sure[place])) - np.log(threshold / (1 - threshold))) > 0.06:
                assert (found["reason"][place] == "confidence") == (sure[place] < threshold)
    dropped = found["reason"][:].count("confidence")
    assert 3 <= dropped <= 6
    # After a kill the thresholds go on where they were.
    write = shards.Shards.write

    class KilledError(BaseException):
        """In the place of a kill."""

    def killed(self: shards.Shards, number: int, rows: Dataset, note: Any) -> None:
        write(self, number, rows, note)
        if number == 1:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(shards.Shards, "write", killed)
        with pytest.raises(KilledError):
            label_dataset(head, rows, tmp_path / "killed", **options)
    label_dataset(head, rows, tmp_path / "killed", **options)
    for number in range(3):
        name = f"data/train-0000{number}.parquet"
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_a_second_view_tells_what_a_label_hangs_on(tmp_path: Path) -> None:
    view = {"noise": {"probability": 1.0, "snr": [0, 0]}}
    plain = labelled("ctc", tmp_path / "plain")
    scores = [json.loads(text)["disagreement"] for text in labelled("ctc", tmp_path / "s", second_view=view)["scores"]]
    limit = float(np.mean(sorted(scores)[3:5]))
    found = labelled("ctc", tmp_path / "out", second_view=view, filters={"disagree": {"maximum": limit}})
    head = CASES["ctc"].make()
    twice = with_second_view(head.labeler, view, head.processing_class)
    apart = []
    for row, given in zip(found, CASES["ctc"].rows(), strict=True):
        [label] = twice.label(head.model, CASES["ctc"].alone(head, given))
        apart.append(label.scores["disagreement"])
        assert json.loads(row["scores"])["disagreement"] == pytest.approx(apart[-1])
    assert found["label_ids"][:] == plain["label_ids"][:]
    assert found["reason"][:] == ["disagree" if share > limit else None for share in apart]
    assert {"disagree", None} == set(found["reason"]) and len(set(apart)) > 2
    with pytest.raises(ValueError, match=r"score 'disagreement'.*disagreement comes of second_view"):
        labelled("ctc", tmp_path / "none", filters={"disagree": {}})
    # Nothing was labelled there, so other arguments may follow.
    labelled("ctc", tmp_path / "none")


def test_numbers_disagree_by_their_distance(tmp_path: Path) -> None:
    head = CASES["regression"].make()

    class Shifted:
        """Another view: all tokens but the first and the last are the first word."""

        def __call__(self, inputs: Any) -> Any:
            ids = inputs["input_ids"].clone()
            ids[:, 1] = 5
            return {**inputs, "input_ids": ids}

    twice = dataclasses.replace(head, labeler=two_views(head.labeler, Shifted(), scale=0.5))
    case = CASES["regression"]
    label_dataset(twice, Dataset.from_list(case.rows()), tmp_path / "out", filters={"disagree": {"maximum": 0.1}})
    found = load_dataset(str(tmp_path / "out"), split="train")
    for row, given in zip(found, case.rows(), strict=True):
        inputs = case.alone(head, given)
        with torch.no_grad():
            one, other = head.model(**inputs).logits[0], head.model(**Shifted()(inputs)).logits[0]
        expected = float(((one - other).abs() / 0.5).clamp(max=1).mean())
        assert json.loads(row["scores"])["disagreement"] == pytest.approx(expected, abs=1e-5)
        assert (row["reason"] == "disagree") == (expected > 0.1)
    assert {"disagree", None} == set(found["reason"])


def test_noise_of_a_second_view_is_the_rows_own() -> None:
    """Not that of its batch, and another one for another row."""
    view = FixedView(AdditiveNoise(1.0))
    rows = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    rows[1, 30:] = 0
    mask = (torch.arange(50)[None] < torch.tensor([50, 30])[:, None]).long()
    both = view({"input_values": rows, "attention_mask": mask})["input_values"]
    alone = view({"input_values": rows[1:, :30]})["input_values"]
    assert torch.equal(both[1:, :30], alone)
    assert not torch.allclose((both - rows)[0, :30], (both - rows)[1, :30], atol=1e-3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ctc", {"filters": {"rate": "fit"}}, "rate are to be fitted, and there are no labelled rows"),
        ("ctc", {"labelled": [{"audio": None, "text": "a"}]}, "labelled rows are for filters that are written as"),
        ("ctc", {"filters": {"rate": "fit"}, "labelled": [{"audio": "x", "words": "a"}]}, "have no column text"),
        (
            "t5",
            {"filters": {"rate": "fit"}, "labelled": [{"source": "a", "target": "a"}]},
            "be fitted for a T5For",
        ),
        ("ctc", {"filters": {"repeet": {}}}, "no filter is called 'repeet'; did you mean repeat"),
        ("ctc", {"filters": {"length_ratio": {"maximum": 2}}}, "LengthRatio need texts to label"),
        ("one-class", {"filters": {"repeat": {}}}, "Repeat need labels that are text"),
        ("t5", {"filters": {"duration": {}}}, "Duration need audio"),
        (
            "one-class",
            {"filters": {"confidence_adaptive": {}}},
            "follows a teacher that learns",
        ),
        (
            "ctc",
            {"second_view": {"nois": {}}},
            "'nois'; did you mean noise[?]; there are token_masking, word",
        ),
        ("ctc", {"second_view": {"token_masking": {"share": 0.1}}}, "one of texts, and this model hears speech"),
        ("whisper", {"second_view": {"speed": {}}}, "hears a window of fixed length"),
        ("words", {"second_view": {"word_dropout": {"share": 0.1}}}, "labels are by word, and word_dropout leaves"),
        ("one-class", {"second_view": {"token_masking": {"share": 0.1}}}, "has no mask token"),
    ],
)
def test_refused_before_anything_is_written(name: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {key: Dataset.from_list(value) if key == "labelled" else value for key, value in options.items()}
    with pytest.raises(ValueError, match=message):
        labelled(name, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_heads_know_their_options() -> None:
    head: Head = CASES["one-class"].make()
    assert head_of(head.model, head.processing_class, temperature=0.5).labeler.temperature == 0.5  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="BertForSequenceClassification have no option num_beams: it has temp"):
        head_of(head.model, head.processing_class, num_beams=2)
    with pytest.raises(ValueError, match="prefix='x' is for models that write texts of texts"):
        head_of(head.model, head.processing_class, prefix="x")
    causal = CASES["gpt2"].make()
    with pytest.raises(ValueError, match="have no option language: it has max_new_tokens"):
        head_of(causal.model, causal.processing_class, language="fr", max_new_tokens=3)
    with pytest.raises(NotImplementedError, match="Linear labels no data sets yet: CTC models, transducers, M"):
        head_of(torch.nn.Linear(1, 1), None)
