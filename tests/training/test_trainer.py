"""The semi-supervised step: who labels, what enters the loss, and what must not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny
import torch

from hf_ema_scaling.data.stream import UNLABELLED
from hf_ema_scaling.ema import EMATeacher, WeightAverage
from hf_ema_scaling.labels import CTCLabeler, PseudoLabel
from hf_ema_scaling.training.trainer import PseudoLabelTrainer


def run(folder: Path, **changes: Any) -> Any:
    own = (
        "labeler",
        "unlabeled_dataset",
        "pl_start",
        "unlabeled_ratio",
        "unlabeled_weight",
        "min_confidence",
        "model",
    )
    given = {key: changes.pop(key) for key in own if key in changes}
    more = {key: given.pop(key) for key in ("labeler", "unlabeled_dataset") if key in given}
    more.setdefault("unlabeled_dataset", tiny.speech(14, 1, labels=False))
    model = given.pop("model", None) or tiny.wav2vec2(dropout=0.1)
    made = tiny.trainer(
        model,
        tiny.arguments(folder, **({"max_steps": 5, "per_device_train_batch_size": 3} | changes)),
        tiny.speech(12),
        pseudo_label_args=tiny.pseudo(**({"pl_start": 2.0, "unlabeled_ratio": 1.0} | given)),
        **more,
    )
    made.train()
    return made


class Watching(CTCLabeler):
    """The usual labeler, and what it was asked."""

    def __init__(self) -> None:
        super().__init__(0)
        self.asked: list[tuple[Any, dict[str, torch.Tensor], list[PseudoLabel], dict[str, torch.Tensor]]] = []
        self.average: Any = None

    def label(self, teacher: Any, batch: Any) -> list[PseudoLabel]:
        labels = super().label(teacher, batch)
        weights = {name: tensor.clone() for name, tensor in teacher.module.state_dict().items()}
        self.asked.append((teacher, {key: value.clone() for key, value in batch.items()}, labels, weights))
        return labels


def test_the_unlabelled_loss_enters_the_gradient_by_its_weight(tmp_path: Path) -> None:
    """The gradient is affine in lambda: at fixed weights g(1) - g(0) is half of g(2) - g(0), and not zero."""
    gradients = {}
    for weight in (0.0, 1.0, 2.0):
        model = tiny.wav2vec2()
        made = tiny.at_fixed_weights(
            model,
            tiny.arguments(tmp_path, max_steps=3),
            tiny.speech(12),
            unlabeled_dataset=tiny.speech(14, 1, labels=False),
            pseudo_label_args=tiny.pseudo(pl_start=1.0, unlabeled_weight=weight),
            labeler=tiny.ContentLabeler(),
        )
        gradients[weight] = made.recorder.gradients
    assert tiny.same_bits(gradients[0.0][0], gradients[1.0][0])
    for step in (1, 2):
        one, two = (
            {n: gradients[w][step][n].double() - g.double() for n, g in gradients[0.0][step].items()}
            for w in (1.0, 2.0)
        )
        assert tiny.difference(gradients[0.0][step], gradients[1.0][step]) > 0.05
        assert tiny.difference(two, {name: 2 * value for name, value in one.items()}) < 1e-5


def test_labels_in_the_unlabelled_set_change_no_bit(tmp_path: Path) -> None:
    bare = tiny.speech(14, 1, labels=False)
    # Text, on which a collator that saw it would stumble.
    texts = [f"not ids {row}" for row in range(14)]
    poisoned = bare.add_column("labels", texts).add_column("label", list(range(14)))
    results = []
    for data in (bare, poisoned):
        made = run(tmp_path, unlabeled_dataset=data, ema_momentum=0.5)
        results.append(
            (tiny.parameters(made.model), tiny.average(made), made.recorder.gradients, made.label_statistics.counts)
        )
    assert results[0][3]["kept"] > 0
    assert tiny.same_bits(results[0], results[1])


def test_labels_are_those_of_the_average_in_eval_mode_on_clean_input(tmp_path: Path) -> None:
    labeler = Watching()
    made = run(tmp_path, labeler=labeler, ema_momentum=0.7, learning_rate=3e-2, pl_start=1.0)
    recorder = made.recorder
    assert len(labeler.asked) == 4
    names = recorder.averages[0].keys()
    differs = False
    for step, (teacher, batch, labels, weights) in enumerate(labeler.asked, start=1):
        assert teacher is made.teacher
        # What it holds is the average after the step before.
        assert tiny.same_bits({name: weights[name] for name in names}, dict(recorder.averages[step - 1]))
        student = tiny.wav2vec2(dropout=0.1)
        student.load_state_dict(weights)
        average = WeightAverage(student)
        assert CTCLabeler(0).label(EMATeacher(student, average), batch) == labels
        student.load_state_dict({**weights, **recorder.weights[step - 1]})
        differs |= CTCLabeler(0).label(student.eval(), batch) != labels
        assert any(label.kept for label in labels)
    assert differs


@pytest.mark.parametrize("labelled", [True, False])
def test_the_teacher_sees_no_augmentation_and_the_student_does(tmp_path: Path, labelled: bool) -> None:
    labeler = Watching()
    data = tiny.speech(9, 1, features=8, labels=False)
    seen: list[torch.Tensor] = []

    def silence(inputs: Mapping[str, torch.Tensor], seeds: Sequence[int]) -> dict[str, torch.Tensor]:
        features = inputs["input_features"]
        assert inputs["attention_mask"].shape == features.shape[:2] and len(seeds) == len(features)
        seen.extend(torch.tensor(seed % 2**40) for seed in seeds)
        return {"input_features": torch.zeros_like(features)}

    made = tiny.trainer(
        tiny.parakeet(),
        tiny.arguments(tmp_path, max_steps=3, seed=7, augment_start=1, augment_labelled=labelled),
        tiny.speech(9, features=8),
        unlabeled_dataset=data,
        pseudo_label_args=tiny.pseudo(),
        labeler=labeler,
        augmentation=silence,
    )
    inputs: list[float] = []
    made.model.register_forward_pre_hook(
        # The teacher is compared with it in eval mode as training begins.
        lambda module, _, given: (
            inputs.append(float(given["input_features"].abs().sum())) if module.training else None
        ),
        with_kwargs=True,
    )
    made.train()
    rows = {tuple(np.asarray(row["input_features"])[0].tolist()) for row in data}
    for _, batch, _, _ in labeler.asked:
        assert all(tuple(row[0].tolist()) in rows for row in batch["input_features"])
    assert [value > 0 for value in inputs] == [True, True, *[not labelled, False] * 2]
    # Rows are seeded by their place in the stream.
    source = made.sampler.stream.source[4:12]
    assert sorted(int(seed) for seed in seen) == [4 + i for i in range(8) if labelled or source[i] == UNLABELLED]


def test_a_step_whose_labels_are_all_dropped_runs_and_learns_from_the_labelled_rows_alone(tmp_path: Path) -> None:
    everything = tiny.ContentLabeler(drop=lambda number: True)
    dropped = run(tmp_path, labeler=everything, logging_strategy="steps", logging_steps=1)
    unweighted = run(tmp_path, labeler=tiny.ContentLabeler(), unlabeled_weight=0.0)
    for step in range(5):
        assert tiny.same_bits(dropped.recorder.gradients[step], unweighted.recorder.gradients[step])
    assert tiny.same_bits(tiny.average(dropped), tiny.average(unweighted))
    logs = [entry for entry in dropped.state.log_history if "loss" in entry]
    assert all(math.isfinite(entry["loss"]) and entry["grad_norm"] > 0 for entry in logs)
    assert [entry.get("pseudo/kept") for entry in logs] == [None, None, 0.0, 0.0, 0.0]
    assert logs[-1]["pseudo/dropped_confidence"] == 1.0 and logs[-1]["pseudo/tokens"] == 0.0
    # Dropped items stay in the denominator: half of the batch, half of the loss.
    assert sum(draw[0] for draw in dropped.drawn[2]) == 2


def test_a_step_of_unlabelled_items_alone_may_lose_them_all(tmp_path: Path) -> None:
    made = run(
        tmp_path,
        labeler=tiny.ContentLabeler(drop=lambda number: True),
        unlabeled_ratio=9.0,
        reference_batch_size=2,
        max_steps=8,
    )
    alone = [step for step, drawn in enumerate(made.drawn) if all(source == 1 for source, _, _ in drawn)]
    assert alone
    for step in alone:
        assert all(not bool(gradient.any()) for gradient in made.recorder.gradients[step].values())
        assert all(bool(weight.isfinite().all()) for weight in made.recorder.weights[step].values())


def test_min_confidence_drops_the_labels_below_it(tmp_path: Path) -> None:
    labeler = Watching()
    run(tmp_path, labeler=labeler)
    scores = sorted(label.confidence for _, _, labels, _ in labeler.asked for label in labels if label.kept)
    limit = scores[len(scores) // 2]
    first = [label.confidence for label in labeler.asked[0][2] if label.kept]
    made = run(tmp_path, max_steps=3, min_confidence=limit)
    counts = made.label_statistics.counts
    assert counts["rows"] == 2 and counts["dropped_confidence"] == sum(score < limit for score in first)
    everything = run(tmp_path, min_confidence=1.0).label_statistics.counts
    assert (
        everything["kept"] == 0
        and everything["dropped_confidence"] + everything["dropped_empty"] == everything["rows"]
    )


def test_raising_the_threshold_never_keeps_more(tmp_path: Path) -> None:
    kept = [
        run(tmp_path, max_steps=3, min_confidence=limit).label_statistics.counts["kept"]
        for limit in (0, 0.15, 0.2, 0.3, 1)
    ]
    assert kept == sorted(kept, reverse=True) and kept[0] > 0 == kept[-1]


def test_logs_count_every_unlabelled_row_once(tmp_path: Path) -> None:
    labeler = Watching()
    made = run(
        tmp_path, labeler=labeler, max_steps=6, kappa=2.0, logging_strategy="steps", logging_steps=4, pl_start=2.0
    )
    logs = [entry for entry in made.state.log_history if "loss" in entry]
    labels = [label for _, _, asked, _ in labeler.asked for label in asked]
    # Steps end at 1, 2, 4, 6; the log at 4 saw four unlabelled rows.
    assert len(labels) == 8
    first = labels[:4]
    assert logs[0]["pseudo/kept"] == sum(label.kept for label in first) / 4
    assert logs[0]["pseudo/confidence"] == pytest.approx(sum(label.confidence for label in first) / 4)
    assert logs[0]["pseudo/tokens"] == sum(len(label.ids) for label in first if label.kept) / sum(
        x.kept for x in first
    )
    assert made.label_statistics.counts["rows"] == 4


def test_units_before_and_after_pl_start(tmp_path: Path) -> None:
    made = run(tmp_path, max_steps=10, kappa=4.0, pl_start=3.0, unlabeled_ratio=3.0)
    # No step crosses pl_start; kappa 1 until then is the default.
    assert [made.sampler.step(i).end for i in range(made.sampler.num_steps)] == [1, 2, 3, 7, 10]
    assert [sum(source for source, _, _ in drawn) for drawn in made.drawn] == [0, 0, 0, 12, 9]
    assert [len(drawn) for drawn in made.drawn] == [4, 4, 4, 16, 12]


def test_the_word_delimiter_is_a_target_and_other_special_tokens_are_not(tmp_path: Path) -> None:
    import json

    from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", "a", "b", "c", "d"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    processor = Wav2Vec2Processor(
        Wav2Vec2FeatureExtractor(return_attention_mask=True), Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))
    )
    made = PseudoLabelTrainer(
        tiny.wav2vec2(),
        tiny.arguments(tmp_path),
        train_dataset=tiny.speech(4),
        unlabeled_dataset=tiny.speech(4, 1, labels=False),
        processing_class=processor,
    )
    logits = torch.nn.functional.one_hot(torch.tensor([[5, 6, 4, 4, 7, 0, 7, 1, 3, 2]]), 9) * 9.0
    labels = made.labeler.from_logits(logits, torch.tensor([10]))  # type: ignore[attr-defined]
    assert labels[0].ids == (5, 6, 4, 7, 7)


def test_what_is_needed_is_asked_for(tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path)
    with pytest.raises(ValueError, match="needs an unlabeled_dataset; without one use EMATrainer"):
        PseudoLabelTrainer(tiny.wav2vec2(), args, train_dataset=tiny.speech(4))
    with pytest.raises(ValueError, match="problem_type is None, so what 3 outputs mean is only known from labels"):
        PseudoLabelTrainer(tiny.bert(), args, train_dataset=tiny.sentences(4), unlabeled_dataset=tiny.sentences(4))
    empty = datasets.Dataset.from_dict({"input_values": []})
    with pytest.raises(ValueError, match="unlabeled_dataset is empty"):
        PseudoLabelTrainer(
            tiny.wav2vec2(),
            args,
            train_dataset=tiny.speech(4),
            unlabeled_dataset=empty,
            data_collator=tiny.CTCCollator(),
        )
    with pytest.raises(ValueError, match="pl_start=9 must be before the end of the run"):
        PseudoLabelTrainer(
            tiny.wav2vec2(),
            args,
            train_dataset=tiny.speech(4),
            unlabeled_dataset=tiny.speech(4, labels=False),
            pseudo_label_args=tiny.pseudo(pl_start=9.0),
            data_collator=tiny.CTCCollator(),
        )
