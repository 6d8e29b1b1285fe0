"""Trainers over streams: the bits of a run over stored data, the same at every kappa, and resumed to the bit."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
import streamed
import tiny
import torch

from hf_ema_scaling.data.streaming import StreamError
from hf_ema_scaling.training.checkpoints import IncompleteCheckpointError
from hf_ema_scaling.training.self_check import self_check
from hf_ema_scaling.training.student_files import CHECKSUMS_NAME

NOT_COMPARED = ("runtime", "per_second", "train_loss")
LABELLED, UNLABELLED = tiny.speech(7), tiny.speech(9, 1)
"""With labels that nobody may see."""


def run(folder: Path, train: Any, unlabelled: Any, *, init: int = 0, dropout: float = 0.0, **changes: Any) -> Any:
    values: dict[str, Any] = {"max_steps": 12, "per_device_train_batch_size": 3, "adam_epsilon": 1e-3, "kappa": 2.0}
    more = {"logging_strategy": "steps", "logging_steps": 2} | changes
    return tiny.trainer(
        tiny.wav2vec2(dropout=dropout, seed=init),
        tiny.arguments(folder, **(values | more)),
        train,
        unlabeled_dataset=unlabelled,
        pseudo_label_args=tiny.pseudo(pl_start=2.0, unlabeled_ratio=1.5, unlabeled_weight=0.7),
        labeler=tiny.ContentLabeler(),
    )


def logs(made: Any) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in entry.items() if not any(name in key for name in NOT_COMPARED)}
        for entry in made.state.log_history
    ]


def outcome(made: Any, since: int = 0) -> tuple[Any, ...]:
    recorder, steps = made.recorder, made.sampler.num_steps - since
    return (
        recorder.weights[-steps:],
        recorder.averages[-steps:],
        recorder.after[-steps:],
        made.drawn[-steps:],
        [entry for entry in logs(made) if entry["step"] > since],
    )


def test_a_stream_in_the_order_of_the_sampler_trains_to_the_same_bits(tmp_path: Path) -> None:
    stored = run(tmp_path / "a", LABELLED, UNLABELLED, kappa=1.0, max_steps=6)
    stored.train()
    seed = stored.args.seed
    for train, unlabelled in (
        (streamed.Permuted(LABELLED, seed, 0), streamed.Permuted(UNLABELLED, seed, 1)),
        (LABELLED, streamed.Permuted(UNLABELLED, seed, 1)),
        (streamed.Permuted(LABELLED, seed, 0), UNLABELLED),
    ):
        made = run(tmp_path / "b", train, unlabelled, kappa=1.0, max_steps=6)
        made.train()
        assert tiny.same_bits(outcome(made)[:3], outcome(stored)[:3])
        # Labels by seconds of audio, which a stream does not know beforehand; there they are by rows.
        told = [[{**log, "pseudo/length_ratio": None} for log in logs(one)] for one in (made, stored)]
        assert told[0] == told[1]
        assert not all(tiny.same_bits(made.recorder.initial, weights) for weights in made.recorder.weights)


@pytest.mark.parametrize("kappa", [2, 4])
def test_the_gradient_of_a_step_is_the_mean_of_its_reference_steps(tmp_path: Path, kappa: int) -> None:
    """At fixed weights, over ends of passes, with dropped labels."""

    def at_kappa(factor: int) -> Any:
        return tiny.at_fixed_weights(
            tiny.wav2vec2(),
            tiny.arguments(tmp_path, max_steps=10, kappa=float(factor), per_device_train_batch_size=3),
            LABELLED.to_iterable_dataset(num_shards=2),
            unlabeled_dataset=UNLABELLED.to_iterable_dataset().shuffle(seed=1, buffer_size=4),
            pseudo_label_args=tiny.pseudo(pl_start=2.0, unlabeled_ratio=1.5, unlabeled_weight=0.7),
            labeler=tiny.ContentLabeler(),
        )

    alone, made = at_kappa(1), at_kappa(kappa)
    first = 0
    steps = [made.sampler.step(number) for number in range(made.sampler.num_steps)]
    assert [step.kappa for step in steps] == [1] * 2 + [kappa] * (8 // kappa)
    for number, step in enumerate(steps):
        last = first + round(step.kappa)
        assert sorted(made.drawn[number]) == sorted(item for drawn in alone.drawn[first:last] for item in drawn)
        expected = tiny.mean(alone.recorder.gradients[first:last])
        assert tiny.difference(expected, made.recorder.gradients[number]) < 1e-5
        first = last
    # Ten reference steps of four rows: labelled alone until step 2, then 2 to 3.
    kinds = [kind for drawn in alone.drawn for kind, _, _ in drawn]
    assert kinds[:8] == [0] * 8 and (kinds.count(0), kinds.count(1)) == (8 + 13, 19)


@pytest.mark.parametrize("kind", ["state", "buffer", "torch"])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Student, average, optimizer, rows and logs, from the middle of passes and across their ends."""

    def data() -> tuple[Any, Any]:
        if kind == "torch":
            return streamed.Permuted(LABELLED, 1, 0), streamed.Plain(list(UNLABELLED))
        made = LABELLED.to_iterable_dataset(num_shards=3), UNLABELLED.to_iterable_dataset(num_shards=2)
        return made if kind == "state" else tuple(part.shuffle(seed=4, buffer_size=3) for part in made)  # type: ignore[return-value]

    values = {"dropout": 0.1, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "cosine"}
    whole = run(tmp_path / "whole", *data(), **values)
    whole.train()
    assert whole.sampler.num_steps == 7
    for stop in (1, 2, 4, 6):
        torch.manual_seed(99)
        caplog.clear()
        made = run(tmp_path / "resumed", *data(), init=5, **values)
        with caplog.at_level(logging.WARNING, "hf_ema_scaling"):
            made.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
        assert len(made.drawn) == 7 - stop
        assert tiny.same_bits(outcome(made, stop), outcome(whole, stop))
        assert ("once more" in caplog.text) == (kind != "state")


def test_a_run_may_go_on_at_another_kappa(tmp_path: Path) -> None:
    data = LABELLED.to_iterable_dataset(num_shards=3), UNLABELLED.to_iterable_dataset(num_shards=2)
    whole = run(tmp_path / "whole", *data, save_strategy="steps", save_steps=1)
    whole.train()
    made = run(tmp_path / "resumed", *data, kappa=4.0)
    made.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert [made.sampler.step(number).kappa for number in range(4, made.sampler.num_steps)] == [4, 2]
    rest = [sorted(item for drawn in both for item in drawn) for both in (whole.drawn[4:], made.drawn)]
    assert rest[0] == rest[1] and len(rest[0]) == 24


def test_without_its_file_a_stream_is_read_up_to_the_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = LABELLED.to_iterable_dataset(num_shards=3), UNLABELLED.to_iterable_dataset(num_shards=2)
    values = {"dropout": 0.1, "save_strategy": "steps", "save_steps": 1}
    whole = run(tmp_path / "whole", *data, **values)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    state = json.loads((checkpoint / "stream_state_0.json").read_text(encoding="utf-8"))
    # Clock 6: 8 labelled rows, then 16 rows 2 to 3 (6.4 and 9.6); the passes are of 7 and of 9.
    assert (state["steps"], state["processes"], state["by_rank"]) == (4, 1, [])
    assert [(s["drawn"], s["passes"], s["rows"]) for s in state["sources"].values()] == [(15, 2, 1), (9, 0, 9)]
    (checkpoint / "stream_state_0.json").unlink()
    made = run(tmp_path / "resumed", *data, init=5, **values)
    with pytest.raises(IncompleteCheckpointError, match=r"stream_state_0\.json is missing \(delete checksums\.json"):
        made.train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / CHECKSUMS_NAME).unlink()
    with caplog.at_level(logging.WARNING, "hf_ema_scaling"):
        made.train(resume_from_checkpoint=str(checkpoint))
    assert "does not say where train_dataset stands after 15 rows" in caplog.text
    assert tiny.same_bits(outcome(made, 4), outcome(whole, 4))


def test_a_stream_does_not_continue_stored_data_or_the_other_way_round(tmp_path: Path) -> None:
    made = run(tmp_path / "a", LABELLED, UNLABELLED, save_strategy="steps", save_steps=6)
    made.train()
    other = run(tmp_path / "b", LABELLED.to_iterable_dataset(), UNLABELLED)
    with pytest.raises(ValueError, match="labelled_items: 7 then, a stream now"):
        other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))


def test_memory_stays_bounded(tmp_path: Path) -> None:
    """The loader is one step ahead of training, and a stream one row ahead of the loader."""
    labelled, unlabelled = streamed.Plain(list(LABELLED) * 20), streamed.Plain(list(UNLABELLED) * 20)
    made = run(tmp_path, labelled, unlabelled)
    ahead: list[tuple[int, int]] = []
    training_step = made.training_step

    def watched(model: Any, inputs: Any, number: Any = None) -> Any:
        upto = min(made.state.global_step + 1, made.sampler.num_steps - 1)
        drawn = [made.sampler.drawn_of(kind, upto)[1] for kind in (0, 1)]
        last = upto == made.sampler.num_steps - 1
        ahead.append((labelled.given - drawn[0], unlabelled.given - drawn[1]))
        assert ahead[-1][0] in (0, 1) and ahead[-1][1] <= 2, (ahead, last)
        return training_step(model, inputs, number)

    made.training_step = watched
    made.train()
    assert len(ahead) == 7 and max(first for first, _ in ahead) == 1


def test_labels_of_unlabelled_rows_never_arrive(tmp_path: Path) -> None:
    """Neither in the batch nor anywhere else: other hidden labels, the same bits."""
    first = run(tmp_path / "a", LABELLED, UNLABELLED.to_iterable_dataset(), remove_unused_columns=False)
    seen: list[set[str]] = []
    collate = first.data_collator
    first.data_collator = lambda rows: (seen.extend(set(row) for row in rows), collate(rows))[1]
    first.train()
    assert sum("labels" not in row for row in seen) >= 15 and {"labels"} < set.union(*seen)
    changed = UNLABELLED.remove_columns("labels").add_column("labels", [[1, 2]] * 9).with_format("numpy")
    second = run(tmp_path / "b", LABELLED, changed.to_iterable_dataset(), remove_unused_columns=False)
    second.train()
    assert tiny.same_bits(outcome(first), outcome(second))


def test_a_corrupt_row_is_named(tmp_path: Path) -> None:
    def read(row: dict[str, Any], number: int) -> dict[str, Any]:
        if number == 5:
            raise OSError("clip.flac: cut short")
        return row

    broken = UNLABELLED.to_iterable_dataset().map(read, with_indices=True)
    with pytest.raises(StreamError, match=r"unlabeled_dataset: row 5 \(from 0\) of pass 1 .*clip\.flac: cut short"):
        run(tmp_path, LABELLED, broken).train()
    labels = [list(row["labels"]) for row in LABELLED]
    labels[4] = [1, 0, 2]
    blank = LABELLED.remove_columns("labels").add_column("labels", labels).with_format("numpy")
    with pytest.raises(ValueError, match="labelled row 4 holds the token 0, the blank"):
        run(tmp_path, blank.to_iterable_dataset(), UNLABELLED).train()
    with pytest.raises(StreamError, match="unlabeled_dataset is empty"):
        run(tmp_path, LABELLED, streamed.Plain([])).train()


@pytest.mark.parametrize(
    ("changes", "pseudo", "message"),
    [
        ({"batch_unit": "seconds"}, {}, "batch_unit=seconds needs the size of every row .* use batch_unit=samples"),
        ({"batch_unit": "tokens"}, {}, "batch_unit=tokens needs the size of every row"),
        ({"bucket_window": 2}, {}, "bucket_window=2 needs the lengths of all rows, and unlabeled_dataset is a stream"),
        ({"dataloader_num_workers": 2}, {}, "dataloader_num_workers=2: workers .* set it to 0"),
        ({}, {"cache_steps": 2.0}, "cache_steps=2: a cache draws the same row several times"),
        ({}, {"cache_half_lives": 2.0}, "cache_half_lives=2: a cache draws .* set it to None for labels"),
        ({}, {"source_column": "duration"}, "source_column='duration' needs all rows at the start"),
        (
            {"batch_unit": "seconds", "bucket_window": 2},
            {"cache_steps": 2.0, "hidden_reference_column": "duration"},
            r"(?s)^4 settings do not go with streams:\n  - batch_unit=.*\n  - bucket_window=2.*\n  - cache_steps=2.*"
            r"\n  - hidden_reference_column='duration' is taken out.*\nIn their place write: batch_unit=samples, "
            r"reference_batch_size=ROWS, bucket_window=0, cache_steps=0, hidden_reference_column=None$",
        ),
    ],
)
def test_what_a_stream_cannot_do_is_refused(
    tmp_path: Path, changes: dict[str, Any], pseudo: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=message):
        tiny.trainer(
            tiny.wav2vec2(),
            tiny.arguments(tmp_path, **changes),
            LABELLED,
            unlabeled_dataset=UNLABELLED.to_iterable_dataset(),
            pseudo_label_args=tiny.pseudo(pl_start=1.0, **pseudo),
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_strategy": "epoch"}, "eval_strategy=epoch waits for the end of a pass.*use 'steps' with eval_steps"),
        ({"save_strategy": "epoch"}, "save_strategy=epoch"),
        ({"logging_strategy": "epoch"}, "logging_strategy=epoch"),
        ({"ema_momentum": None, "ema_epoch_weight": 0.5}, r"ema_epoch_weight=0\.5 is the weight after a pass"),
        ({"batch_schedule": json.dumps([{"batch_size": 4, "until_epochs": 1}, {"batch_size": 8}])}, "until_epochs"),
        ({"max_steps": -1}, "max_steps"),
        (
            {"eval_strategy": "epoch", "save_strategy": "epoch"},
            r"(?s)^2 settings do .* eval_strategy=steps, eval_steps=",
        ),
    ],
)
def test_what_counts_passes_needs_a_labelled_set_with_a_length(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    args = tiny.arguments(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tiny.bert(), args, tiny.sentences(8).to_iterable_dataset(), eval_dataset=tiny.sentences(3))
    # An unlabelled stream has no say in it.
    if "batch_schedule" not in changes and "max_steps" not in changes:
        data = {"unlabeled_dataset": UNLABELLED.to_iterable_dataset(), "eval_dataset": tiny.speech(3)}
        args = tiny.arguments(tmp_path, **changes)
        tiny.trainer(tiny.wav2vec2(), args, LABELLED, **data, pseudo_label_args=tiny.pseudo(pl_start=1.0))


def test_streams_pass_the_checks_before_a_run(tmp_path: Path) -> None:
    made = run(tmp_path, LABELLED.to_iterable_dataset(), UNLABELLED.to_iterable_dataset())
    found = {check.name: check for check in self_check(lambda: made, rows=5)}
    assert [found[name].result for name in ("recipe", "data", "labels", "split", "teacher")] == ["passed"] * 5
    assert found["data"].detail == (
        "labelled a stream (its first 5 rows looked at), unlabelled a stream (its first 5 rows looked at)"
    )
    assert found["labels"].detail == "the labels of the first 5 rows fit their frames"


def test_a_classifier_learns_from_a_stream(tmp_path: Path) -> None:
    """`EMATrainer` alone, and an evaluation set that is a stream, too."""
    data = tiny.sentences(11)
    made = tiny.trainer(
        tiny.bert(),
        tiny.arguments(tmp_path, max_steps=5, reference_batch_size=3),
        data.to_iterable_dataset(),
        eval_dataset=tiny.sentences(4, 3).to_iterable_dataset(),
    )
    made.train()
    order = [index for drawn in made.drawn for _, index, _ in drawn]
    assert sorted(order[:11]) == list(range(11)) and order[9:] == [9, 10, 0, 1, 2, 3]
    stored = made.evaluate(tiny.sentences(4, 3))
    assert made.evaluate()["eval_ema_loss"] == pytest.approx(stored["eval_ema_loss"], rel=1e-6)


def test_a_dictionary_of_splits_is_no_stream(tmp_path: Path) -> None:
    splits = datasets.IterableDatasetDict({"train": LABELLED.to_iterable_dataset()})
    with pytest.raises((TypeError, ValueError, KeyError)):
        tiny.trainer(tiny.wav2vec2(), tiny.arguments(tmp_path), splits).train()
