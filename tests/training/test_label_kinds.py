"""Runs with labels other than transcripts: classes, probabilities, several classes, numbers, tags by word."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny
import torch
from torch import Tensor
from transformers import BertConfig, BertForTokenClassification

from hf_ema_scaling.data.text_views import TokenMasking, WordDropout
from hf_ema_scaling.labels import ClassLabeler, TokenLabeler

NAMES = {0: "O", 1: "B-a", 2: "I-a"}


def classifier(problem: str = "single_label_classification", outputs: int = 3) -> Any:
    model = tiny.bert()
    torch.manual_seed(1)
    model.config.problem_type, model.config.num_labels = problem, outputs
    model.classifier = torch.nn.Linear(8, outputs)
    model.num_labels = outputs
    return model


def tagger() -> BertForTokenClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 8}
    return BertForTokenClassification(
        BertConfig(vocab_size=20, initializer_range=0.3, id2label=NAMES, **sizes, **dropout)
    )


def tagged(count: int, seed: int, lengths: tuple[int, int] = (4, 8)) -> datasets.Dataset:
    """Tokens, some of which go on with a word, and a label for each word."""
    rng = np.random.default_rng(seed)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "word_ids": [], "labels": []}
    for _ in range(count):
        size = int(rng.integers(*lengths))
        begins = np.concatenate([[True], rng.random(size - 1) < 0.6])
        rows["input_ids"].append(rng.integers(0, 20, size).tolist())
        rows["word_ids"].append((begins.cumsum() - 1).tolist())
        rows["labels"].append(
            [int(label) if first else -100 for label, first in zip(rng.integers(0, 3, size), begins, strict=True)]
        )
    return datasets.Dataset.from_dict(rows).with_format("torch")


def pad_tags(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    fills = {"input_ids": 0, "word_ids": -1, "labels": -100, "attention_mask": 0}
    rows = [{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in rows]
    return {
        name: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=fills[name])
        for name in rows[0]
    }


def texts(folder: Path, model: Any, train: Any = None, **changes: Any) -> dict[str, Any]:
    arguments = {"max_steps": 3, "learning_rate": 0.0, "reference_batch_size": 6}
    pseudo = {
        name: changes.pop(name) for name in ("unlabeled_weight", "cache_steps", "min_confidence") if name in changes
    }
    more = {name: changes.pop(name) for name in ("labeler", "augmentation") if name in changes}
    made: dict[str, Any] = {
        "model": model,
        "args": tiny.arguments(folder, **{**arguments, **changes}),
        "train": train or tiny.sentences(9),
        "unlabeled_dataset": tiny.sentences(12, 1, lengths=(3, 7)),
        "pseudo_label_args": tiny.pseudo(**pseudo),
        "data_collator": tiny.pad_sentences,
    }
    return made | more


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
