"""Runs with labels other than transcripts: classes, probabilities, several classes, numbers, tags by word."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
from head_runs import NAMES, classifier, pad_tags, tagged, tagger, texts
from torch import Tensor

from hf_ema_scaling.data.text_views import TokenMasking, WordDropout
from hf_ema_scaling.labels import ClassLabeler, TokenLabeler


def test_probabilities_of_the_student_itself_teach_it_nothing(tmp_path: Path) -> None:
    """The gradient of cross-entropy in the logits is softmax - target, and here the average still is the student."""
    soft, hard, none = (
        tiny.at_fixed_weights(**texts(tmp_path, classifier(), **changes)).recorder.gradients
        for changes in ({"labeler": ClassLabeler(3, soft=True)}, {}, {"unlabeled_weight": 0.0})
    )
    for step in range(3):
        assert tiny.difference(none[step], soft[step]) < 1e-5
        assert tiny.difference(none[step], hard[step]) > 0.01


def test_numbers_and_several_classes_enter_the_loss(tmp_path: Path) -> None:
    def relabelled(value: Any) -> datasets.Dataset:
        rows = tiny.sentences(9)
        return rows.remove_columns("labels").add_column("labels", [value] * 9).with_format("torch")

    for problem, outputs, value in (("regression", 1, 0.5), ("multi_label_classification", 3, [0.0, 1.0, 1.0])):
        made, none = (
            tiny.at_fixed_weights(**texts(tmp_path, classifier(problem, outputs), relabelled(value), **changes))
            for changes in ({}, {"unlabeled_weight": 0.0})
        )
        assert made.label_statistics.counts["kept"] == 9
        difference = tiny.difference(none.recorder.gradients[0], made.recorder.gradients[0])
        # A regression's own numbers teach nothing either; a yes or no is not the sigmoid.
        assert (difference < 1e-5) if problem == "regression" else (difference > 0.01)


@pytest.mark.parametrize("cache", [0, 1])
def test_tags_by_word_are_the_same_for_every_batch_and_split(tmp_path: Path, cache: int) -> None:
    def gradients(**changes: Any) -> list[dict[str, Tensor]]:
        seen: list[Mapping[str, Any]] = []
        model = tagger()
        model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
        made = tiny.at_fixed_weights(
            model,
            tiny.arguments(tmp_path, **{"max_steps": 4, "reference_batch_size": 6, **changes}),
            tagged(9, 0).remove_columns("word_ids"),
            unlabeled_dataset=tagged(12, 1),
            pseudo_label_args=tiny.pseudo(cache_steps=cache),
            labeler=TokenLabeler(NAMES, label_all_tokens=True),
            data_collator=pad_tags,
        )
        assert {frozenset(inputs) for inputs in seen} == {frozenset({"input_ids", "attention_mask"})}
        assert made.label_statistics.counts["kept"] == 12
        return made.recorder.gradients

    whole = gradients()
    for step, split in enumerate(gradients(per_device_train_batch_size=2)):
        assert tiny.difference(whole[step], split) < 1e-5
    if not cache:
        (together,) = gradients(batch_size=24)
        assert tiny.difference(tiny.mean(whole), together) < 1e-5


def test_what_is_hidden_stays_hidden(tmp_path: Path) -> None:
    def run(truth: int) -> Any:
        hidden = tagged(12, 1).map(lambda row: {"labels": [truth] * len(row["input_ids"])}).with_format("torch")
        made = tiny.trainer(
            tagger(),
            tiny.arguments(tmp_path),
            tagged(9, 0),
            unlabeled_dataset=hidden,
            pseudo_label_args=tiny.pseudo(),
            data_collator=pad_tags,
        )
        made.train()
        return tiny.parameters(made.model)

    assert tiny.same_bits(run(0), run(2))


def test_views_that_move_tokens_do_not_go_with_labels_by_token(tmp_path: Path) -> None:
    data = tagged(9, 0)
    with pytest.raises(ValueError, match="WordDropout drops or moves tokens, and the labels of BertForTokenClassif"):
        tiny.trainer(tagger(), tiny.arguments(tmp_path), data, augmentation=WordDropout(0.1, 0))
    tiny.trainer(tagger(), tiny.arguments(tmp_path), data, augmentation=TokenMasking(0.1, 19))
    tiny.trainer(tiny.bert(), tiny.arguments(tmp_path), tiny.sentences(4), augmentation=WordDropout(0.1, 0))


def test_the_student_sees_masks_and_the_teacher_the_text(tmp_path: Path) -> None:
    asked: list[Tensor] = []

    class Watching(ClassLabeler):
        def label(self, teacher: Any, batch: Mapping[str, Tensor]) -> Any:
            asked.append(batch["input_ids"])
            return super().label(teacher, batch)

    seen: list[Tensor] = []
    model = classifier()
    model.bert.embeddings.word_embeddings.weight.data = torch.cat(
        [model.bert.embeddings.word_embeddings.weight.data, torch.zeros(1, 8)]
    )
    model.config.vocab_size = 21
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    made = tiny.trainer(**texts(tmp_path, model, labeler=Watching(3), augmentation=TokenMasking(0.5, 20)))
    made.args.learning_rate = 1e-2
    made.train()
    assert asked and not any((ids == 20).any() for ids in asked)
    shares = [(ids == 20).float().mean().item() for ids in seen[-6:]]
    assert all(0.05 < share < 0.95 for share in shares)
