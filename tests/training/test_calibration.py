"""The teacher on labelled rows: what it may see of them, where inputs hold more than what is to be labelled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import head_runs
import pytest
import tiny
import tiny_generation
import torch
from rapidfuzz.distance import Levenshtein

from hf_ema_scaling.labels import TokenLabeler, generative_labeler_for, two_views
from hf_ema_scaling.labels.base import ReadsLabelledRows
from hf_ema_scaling.training.arguments import PseudoLabelArguments
from hf_ema_scaling.training.trainer import PseudoLabelTrainer


def calibrated(trainer: Any) -> dict[str, float]:
    """What a run whose weights stand still logs of labelled rows, once."""
    unwatched = tiny.Unwatched()
    unwatched.trainer = trainer
    trainer.add_callback(unwatched)
    trainer.train()
    (found,) = [log for log in trainer.state.log_history if "calibration/error" in log]
    return found


def standing_still() -> dict[str, Any]:
    return {"max_steps": 2, "learning_rate": 0.0, "eval_strategy": "steps", "eval_steps": 2}


def run_of_prompts(folder: Path, labelled: datasets.Dataset, **changes: Any) -> Any:
    model = tiny_generation.gpt2(5)
    options = {"max_new_tokens": 8, **changes.pop("options", {})}
    return PseudoLabelTrainer(
        model,
        head_runs.arguments(folder, **{**standing_still(), **changes}),
        train_dataset=labelled,
        eval_dataset=labelled.select(range(2)),
        unlabeled_dataset=head_runs.rows_of("gpt2", 14, 1, labels=False),
        pseudo_label_args=PseudoLabelArguments(pl_start=0.0, calibration_rows=12),
        labeler=generative_labeler_for(model, **options),
        data_collator=head_runs.collate,
    )


def continued(prompt: list[int]) -> list[int]:
    """The teacher's continuation of a prompt alone, its end (id 2) included."""
    found = (
        tiny_generation.gpt2(5)
        .eval()
        .generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=2)
    )
    return found[0, len(prompt) :].tolist()


def test_a_causal_teacher_sees_the_prompt_and_not_the_completion(tmp_path: Path) -> None:
    """Rows whose completion is what the teacher says itself: it is right, and would not be were it shown it."""
    prompts = head_runs.rows_of("gpt2", 12, 4, labels=False)["input_ids"]
    completions = [continued(prompt) for prompt in prompts]
    assert len({tuple(one) for one in completions}) > 3
    rows = {
        "input_ids": [a + b for a, b in zip(prompts, completions, strict=True)],
        "labels": [[-100] * len(a) + b for a, b in zip(prompts, completions, strict=True)],
    }
    found = calibrated(run_of_prompts(tmp_path, datasets.Dataset.from_dict(rows)))
    assert found["calibration/error"] == 0.0
    # Half of the rows say something else: edits by hand.
    other = [[10, 11, 2] if row % 2 else one for row, one in enumerate(completions)]
    rows = {
        "input_ids": [a + b for a, b in zip(prompts, other, strict=True)],
        "labels": [[-100] * len(a) + b for a, b in zip(prompts, other, strict=True)],
    }
    edits = sum(Levenshtein.distance(a, b) for a, b in zip(completions, other, strict=True))
    found = calibrated(run_of_prompts(tmp_path, datasets.Dataset.from_dict(rows)))
    assert found["calibration/error"] == pytest.approx(edits / sum(map(len, other)))
    assert edits > 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_labelled_rows_by_hand(side: str) -> None:
    rows = [
        ([11, 12, 13, 14], [-100, -100, 13, 14]),
        # Two turns: the first one is compared.
        ([11, 12, 13, 14, 15, 16], [-100, 12, 13, -100, -100, 16]),
        # Nothing predicts the first token; and a row without a label.
        ([11, 12], [11, 12]),
        ([11, 12, 13], [-100, -100, -100]),
    ]

    def filled(row: list[int], filler: int) -> list[int]:
        rest = [filler] * (6 - len(row))
        return rest + row if side == "left" else row + rest

    labeler = generative_labeler_for(tiny_generation.gpt2(5), max_new_tokens=8)
    assert isinstance(labeler, ReadsLabelledRows)
    inputs, labels = labeler.as_unlabelled(
        {
            "input_ids": torch.tensor([filled(ids, 2) for ids, _ in rows]),
            "attention_mask": torch.tensor([filled([1] * len(ids), 0) for ids, _ in rows]),
        },
        torch.tensor([filled(labels, -100) for _, labels in rows]),
    )
    kept = inputs["attention_mask"].bool()
    assert [row[mask].tolist() for row, mask in zip(inputs["input_ids"], kept, strict=True)] == [
        [11, 12],
        [11],
        [11],
        [11, 12, 13],
    ]
    assert [row[row >= 0].tolist() for row in labels] == [[13, 14], [12, 13], [12], []]


@pytest.mark.parametrize("views", [False, True])
def test_tags_of_labelled_rows_are_compared_word_by_word(tmp_path: Path, views: bool) -> None:
    """Labelled rows have no `word_ids`; labels themselves say where words begin."""
    data = head_runs.tagged(8, 0)
    labeler: Any = TokenLabeler(head_runs.NAMES)
    if views:
        labeler = two_views(labeler, dict)
    made = tiny.trainer(
        head_runs.tagger(),
        tiny.arguments(tmp_path, **standing_still()),
        data,
        eval_dataset=data.remove_columns("word_ids").select(range(2)),
        unlabeled_dataset=head_runs.tagged(12, 1),
        pseudo_label_args=tiny.pseudo(calibration_rows=8),
        labeler=labeler,
        data_collator=head_runs.pad_tags,
    )
    found = calibrated(made)
    plain, wrong, words = TokenLabeler(head_runs.NAMES), 0, 0
    for row in data:
        batch = head_runs.pad_tags([{name: row[name] for name in ("input_ids", "word_ids")}])
        (label,) = plain.label(head_runs.tagger().eval(), batch)
        gold = row["labels"][row["labels"] >= 0].tolist()
        wrong += sum(a != b for a, b in zip(label.ids, gold, strict=True))
        words += len(gold)
    assert 0 < wrong < words
    assert found["calibration/error"] == pytest.approx(wrong / words)


def test_what_is_drawn_does_not_depend_on_the_split_into_batches(tmp_path: Path) -> None:
    rows, drawn = head_runs.rows_of("gpt2", 12), {"options": {"temperature": 1.5}}
    found = [
        calibrated(run_of_prompts(tmp_path / str(size), rows, per_device_eval_batch_size=size, **drawn))
        for size in (3, 5)
    ]
    names = ("calibration/error", "calibration/ece")
    assert [found[0][name] for name in names] == pytest.approx([found[1][name] for name in names], rel=1e-6)
    greedy = calibrated(run_of_prompts(tmp_path / "greedy", rows))
    assert abs(greedy["calibration/error"] - found[0]["calibration/error"]) > 1e-3
