"""The teacher's batches are free: they change its throughput, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from hf_ema_scaling.labels import PseudoLabel

CONFIDENCE = 0.3
"""Of which some labels fall short."""


class Counted:
    """Rows of every forward pass of the teacher, and the labels of every row of the stream."""

    def __init__(self, made: Any) -> None:
        self.rows: list[int] = []
        self.steps: list[int] = []
        self.labels: dict[int, PseudoLabel] = {}
        made.teacher_rows = self
        inner = made.labels_of

        def labels_of(batch: Any) -> list[PseudoLabel]:
            labels: list[PseudoLabel] = inner(batch)
            self.rows.append(len(labels))
            self.steps.append(made.state.global_step)
            self.labels.update(zip(batch["positions"], labels, strict=True))
            return labels

        made.labels_of = labels_of


def run(folder: Path, label_batch_size: int | None, *, model: Any = None, pseudo: Any = None, **changes: Any) -> Any:
    values = {"max_steps": 6, "kappa": 4.0, "per_device_train_batch_size": 3, "adam_epsilon": 1e-3}
    made = tiny.trainer(
        model or tiny.wav2vec2(),
        tiny.arguments(folder, **(values | changes)),
        tiny.speech(20),
        unlabeled_dataset=tiny.speech(20, 1, labels=False),
        pseudo_label_args=tiny.pseudo(
            pl_start=2.0, unlabeled_ratio=3.0, label_batch_size=label_batch_size, **(pseudo or {})
        ),
    )
    Counted(made)
    made.train()
    return made


@pytest.fixture(scope="module")
def by_micro_batches(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = run(tmp_path_factory.mktemp("run"), None, pseudo={"min_confidence": CONFIDENCE})
    made.state.global_step -= 1  # as within its last step
    return made


@pytest.mark.parametrize("size", [1, 5, 100])
def test_labels_and_gradients_are_those_of_the_micro_batches(by_micro_batches: Any, tmp_path: Path, size: int) -> None:
    made, plain = run(tmp_path, size, pseudo={"min_confidence": CONFIDENCE}), by_micro_batches
    assert made.drawn == plain.drawn
    # Twelve unlabelled rows in the only step past pl_start.
    assert plain.teacher_rows.rows == [3] * 4
    assert len(made.teacher_rows.rows) == -(-12 // size) and sum(made.teacher_rows.rows) == 12
    found, expected = made.teacher_rows.labels, plain.teacher_rows.labels
    assert found.keys() == expected.keys() == {p for step in made.drawn for source, _, p in step if source == 1}
    for position, label in expected.items():
        assert (found[position].ids, found[position].reason) == (label.ids, label.reason)
        assert found[position].confidence == pytest.approx(label.confidence, abs=1e-6)
    assert {label.kept for label in expected.values()} == {True, False}
    assert len({label.ids for label in expected.values()}) > 3
    for step in range(3):
        assert tiny.same_bits(made.recorder.gradients[step], plain.recorder.gradients[step])
    assert tiny.same_bits(tiny.average(made), tiny.average(plain))


@pytest.mark.parametrize("workers", [0, 1])
def test_every_step_takes_as_few_passes_as_it_can(tmp_path: Path, workers: int) -> None:
    changes = {"max_steps": 12, "kappa": 3.0, "dataloader_num_workers": workers, "dataloader_prefetch_factor": None}
    if workers:
        changes["dataloader_prefetch_factor"] = 2
    made = run(tmp_path, 4, **changes)
    for step, draws in enumerate(made.drawn):
        rows = [count for count, at in zip(made.teacher_rows.rows, made.teacher_rows.steps, strict=True) if at == step]
        unlabelled = sum(source for source, _, _ in draws)
        assert sum(rows) == unlabelled and len(rows) == -(-unlabelled // 4) and all(count <= 4 for count in rows)
    assert len(made.drawn) == 6 and len(made.teacher_rows.rows) == 3 + 3 + 3 + 1


def test_padding_is_not_labelled(by_micro_batches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = by_micro_batches
    seen: list[list[int]] = []

    def labels_of(taken: Any) -> list[PseudoLabel]:
        seen.append(taken["positions"])
        return [PseudoLabel((2, 3), 1.0)]

    monkeypatch.setattr(made, "labels_of", labels_of)
    inputs = {"input_values": torch.zeros(1, 320)}
    batches = [
        {"source": 1, "inputs": inputs, "positions": [7], "indices": [0], "weight": weight} for weight in (1.0, 0.0)
    ]
    results = made.label_micro_batches({"micro_batches": batches})
    assert seen == [[7]]
    assert [result["example_weights"].tolist() for result in results] == [[1.0], [0.0]]
    assert made.label_micro_batches({"micro_batches": batches[1:]})[0]["inputs"]["labels"].tolist() == [[-100]]
    assert len(seen) == 1


def test_frames_of_the_student_decide_which_labels_are_too_long(
    by_micro_batches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = by_micro_batches
    batch = {
        "source": 1,
        "inputs": {"input_values": torch.zeros(2, 96), "attention_mask": torch.ones(2, 96, dtype=torch.long)},
        "positions": [7, 8],
        "indices": [0, 1],
        "weight": 1.0,
    }
    longer = {**batch, "inputs": {"input_values": torch.zeros(2, 9600)}}
    labels = [PseudoLabel((1,) * 9, 1.0), PseudoLabel((2, 3), 1.0)]
    monkeypatch.setattr(made, "labels_of", lambda taken: labels)
    (result,) = made.label_micro_batches({"micro_batches": [batch], "label_batches": [longer]})
    assert result["example_weights"].tolist() == [0.0, 1.0]
    assert result["inputs"]["labels"].tolist() == [[-100, -100], [2, 3]]


def test_a_row_without_a_label_is_an_error(by_micro_batches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = by_micro_batches
    monkeypatch.setattr(made, "labels_of", lambda taken: [])
    batch = {"source": 1, "inputs": {}, "positions": [7], "indices": [0], "weight": 1.0}
    with pytest.raises(ValueError, match="shorter"):
        made.label_micro_batches({"micro_batches": [batch]})


def test_a_size_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="label_batch_size must be at least 1 or None, got 0"):
        tiny.pseudo(label_batch_size=0)
