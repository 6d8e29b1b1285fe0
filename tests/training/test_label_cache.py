"""Training from the label cache: which labels are used, at every kappa, and after a resume."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from torch import Tensor
from torch.utils.data import DataLoader

from hf_ema_scaling.labels import PseudoLabel
from hf_ema_scaling.labels.cache import CACHE_NAME, LabelCacheError
from hf_ema_scaling.training.checkpoints import IncompleteCheckpointError
from hf_ema_scaling.training.student_files import CHECKSUMS_NAME

STEPS, PL_START, CACHE, REFRESH = 24, 2.0, 4.0, 0.3


class StepLabeler:
    """Labels say in which optimizer step they were made, and of what; some are dropped."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.rows: list[tuple[int, int]] = []

    def label(self, teacher: Callable[..., Any], batch: Mapping[str, Tensor]) -> list[PseudoLabel]:
        step = self.trainer.state.global_step
        labels = []
        for row in batch["input_values"]:
            content = int(abs(float(row[0])) * 1000)
            digits = tuple(1 + (number // 7**place) % 7 for number in (step, content) for place in range(4))
            labels.append(PseudoLabel(digits, 0.5, "confidence" if content % 5 == 0 else None))
        self.rows.append((step, len(labels)))
        return labels


def made_in(label: list[int]) -> int:
    """The optimizer step that a label of `StepLabeler` was made in."""
    return sum((digit - 1) * 7**place for place, digit in enumerate(label[:4]))


def trainer_of(folder: Path, labeler: Any = None, *, init: int = 0, pl: Any = None, **changes: Any) -> Any:
    values = {"max_steps": STEPS, "per_device_train_batch_size": 3, "adam_epsilon": 1e-3, "learning_rate": 3e-3}
    pseudo = {"pl_start": PL_START, "unlabeled_ratio": 3.0, "cache_steps": CACHE, "cache_refresh": REFRESH}
    made = tiny.trainer(
        tiny.wav2vec2(dropout=0.1, seed=init),
        tiny.arguments(folder, **(values | changes)),
        tiny.speech(20),
        unlabeled_dataset=tiny.speech(20, 1, labels=False),
        pseudo_label_args=tiny.pseudo(**(pseudo | (pl or {}))),
        labeler=labeler,
    )
    if isinstance(labeler, StepLabeler):
        labeler.trainer = made
    return made


def trained_on(made: Any) -> dict[int, list[int]]:
    """Notes the target of every unlabelled row by stream position while `made` trains; dropped ones are empty."""
    targets: dict[int, list[int]] = {}
    inner = made.label_micro_batches

    def label_micro_batches(inputs: Any) -> Any:
        result = inner(inputs)
        for batch in result:
            if batch["source"] == 1 and batch["weight"]:
                for position, row in zip(batch["positions"], batch["inputs"]["labels"].tolist(), strict=True):
                    targets[position] = [value for value in row if value >= 0]
        return result

    made.label_micro_batches = label_micro_batches
    return targets


def expected_steps(made: Any) -> dict[int, int]:
    """The optimizer step in which the label of each unlabelled draw is made: a pool kept item by item."""
    sampler, pool = made.sampler, made.sampler.stream.pool
    step_of = np.repeat(np.arange(sampler.num_steps), np.diff(sampler.positions)).tolist()
    holds: dict[int, int] = {}
    expected = {}
    for position in np.flatnonzero(sampler.stream.source == 1).tolist():
        slot = int(pool.slot[position])
        holds.setdefault(slot, step_of[position])
        expected[position] = holds[slot]
        if pool.entering[position] >= 0:
            holds[slot] = step_of[position]
    return expected


@pytest.mark.parametrize("kappa", [1.0, 2.0, 8.0])
@pytest.mark.parametrize("label_batch_size", [None, 2])
def test_labels_used_are_those_made_when_their_item_entered(
    tmp_path: Path, kappa: float, label_batch_size: int | None
) -> None:
    labeler = StepLabeler()
    pl = {"label_batch_size": label_batch_size}
    made = trainer_of(
        tmp_path, labeler, kappa=kappa, pl=pl, max_example_loss=None, logging_strategy="steps", logging_steps=1
    )
    targets = trained_on(made)
    made.train()
    expected = expected_steps(made)
    kept = {position: made_in(target) for position, target in targets.items() if target}
    assert targets.keys() == expected.keys() and len(expected) == 66 and 40 < len(kept) < 66
    assert kept == {position: expected[position] for position in kept}
    # Content in the label is the item's: with its step it is the whole label.
    data = tiny.speech(20, 1, labels=False)
    for position in kept:
        content = int(abs(float(data[int(made.sampler.stream.index[position])]["input_values"][0])) * 1000)
        assert targets[position][4:] == [1 + (content // 7**place) % 7 for place in range(4)]
    # Nothing but what enters is labelled, and in batches of the size asked for.
    pool, rows = made.sampler.stream.pool, labeler.rows
    entering = int((pool.entering >= 0).sum())
    assert sum(count for _, count in rows) == pool.size + entering < 66
    assert max(count for _, count in rows) <= (label_batch_size or 3)
    for number in range(made.sampler.num_steps):
        events = pool.events(int(made.sampler.positions[number]), int(made.sampler.positions[number + 1]))
        batches = [count for step, count in rows if step == number]
        assert sum(batches) == len(events.positions)
        assert len(batches) == -(-len(events.positions) // (label_batch_size or 3))
    # Age and share of new labels, as logged, against the same pool.
    logs = [entry for entry in made.state.log_history if "cache/age" in entry]
    steps = [made.sampler.step(number) for number in range(made.sampler.num_steps)]
    first = next(number for number, step in enumerate(steps) if step.end > PL_START)
    assert len(logs) == len(steps) - first
    for number, entry in enumerate(logs, start=first):
        positions = range(int(made.sampler.positions[number]), int(made.sampler.positions[number + 1]))
        ages = [steps[number].start - steps[expected[p]].start for p in positions if p in expected]
        assert entry["cache/age"] == pytest.approx(np.mean(ages), abs=1e-12)
        events = pool.events(positions[0], positions[-1] + 1).positions
        assert entry["cache/relabelled"] == len(events) / len(ages)
        assert entry["cache/size"] == (pool.held(positions[-1] + 1) >= 0).sum()
    assert logs[-1]["cache/size"] == pool.size == 12


class RowLabeler:
    """Which rows of the unlabelled set were labelled, step by step."""

    def __init__(self, data: Any) -> None:
        self.row_of = {round(float(row["input_values"][0]), 6): number for number, row in enumerate(data)}
        self.trainer: Any = None
        self.rows: dict[int, list[int]] = {}

    def label(self, teacher: Callable[..., Any], batch: Mapping[str, Tensor]) -> list[PseudoLabel]:
        rows = [self.row_of[round(float(values[0]), 6)] for values in batch["input_values"]]
        self.rows.setdefault(self.trainer.state.global_step, []).extend(rows)
        return [PseudoLabel((1 + row % 7,), 0.5) for row in rows]


@pytest.mark.parametrize("kappa", [1.0, 3.0])
def test_one_iterator_serves_the_run_and_each_relabelling_goes_on_where_the_last_one_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kappa: float
) -> None:
    """A new iterator for each would label the first rows over and over, and read them from disk anew."""
    opened: list[int] = []
    begin = DataLoader.__iter__

    def counted(self: DataLoader[Any]) -> Any:
        opened.append(len(labeler.rows))
        return begin(self)

    monkeypatch.setattr(DataLoader, "__iter__", counted)
    labeler = RowLabeler(tiny.speech(20, 1, labels=False))
    made = trainer_of(tmp_path, labeler, kappa=kappa, pl={"cache_refresh": 0.5})
    labeler.trainer = made
    made.train()
    assert opened == [0]
    assert sum(step >= 2 + CACHE for step in labeler.rows) > 2  # more than the filling of the cache
    times = dict.fromkeys(range(20), 0)
    for step in sorted(labeler.rows):
        for row in labeler.rows[step]:
            times[row] += 1
        # Every row in turn: none a second time before all were labelled once.
        assert max(times.values()) - min(times.values()) <= 1, step
    assert max(times.values()) == 2


def test_a_kappa_step_is_the_mean_of_its_reference_steps_while_the_weight_rises(tmp_path: Path) -> None:
    """At fixed weights, with labels that depend on their item alone, from cache and ramp."""

    def gradients(kappa: float, **pl: Any) -> list[tiny.Tensors]:
        values = {"pl_start": 2.0, "unlabeled_ratio": 3.0, "cache_steps": 3.0, "pl_ramp": 11.0}
        made = tiny.at_fixed_weights(
            tiny.wav2vec2(),
            tiny.arguments(
                tmp_path, max_steps=18, kappa=kappa, logging_strategy="steps", logging_steps=1, max_example_loss=None
            ),
            tiny.speech(20),
            unlabeled_dataset=tiny.speech(20, 1, labels=False),
            pseudo_label_args=tiny.pseudo(**(values | {"unlabeled_weight": 0.7} | pl)),
            labeler=tiny.ContentLabeler(),
        )
        weights = [entry["pl/weight"] for entry in made.state.log_history if "pl/weight" in entry]
        ramp = np.clip((np.arange(2, 18) + 0.5 - 2) / pl.get("pl_ramp", 11.0), 0, 1) if pl.get("pl_ramp", 1) else 1.0
        reference = 0.7 * ramp * np.ones(16)
        assert weights == pytest.approx(reference.reshape(-1, int(kappa)).mean(1).tolist(), rel=1e-12)
        result: list[tiny.Tensors] = made.recorder.gradients
        return result

    ones, eights = gradients(1.0), gradients(8.0)
    assert len(ones) == 18 and len(eights) == 4
    for number, low in enumerate((2, 10), start=2):
        assert tiny.difference(tiny.mean(ones[low : low + 8]), eights[number]) < 1e-5
    # Labels count, and count less while their weight rises.
    full = gradients(8.0, pl_ramp=0.0)
    assert tiny.difference(full[2], eights[2]) > 0.05


def test_a_cache_changes_what_is_trained_on_and_none_is_the_same_as_before(tmp_path: Path) -> None:
    plain = trainer_of(tmp_path, pl={"cache_steps": 0.0})
    plain.train()
    cached = trainer_of(tmp_path)
    cached.train()
    full = int(cached.sampler.stream.position(PL_START + CACHE)) // 4
    assert plain.cached_labels is None and plain.drawn[:full] == cached.drawn[:full]
    for step in range(full):
        assert tiny.same_bits(plain.recorder.gradients[step], cached.recorder.gradients[step])
    assert plain.drawn[full:] != cached.drawn[full:]


SAVING = {"save_strategy": "steps", "save_steps": 1, "logging_strategy": "steps", "logging_steps": 3}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("whole")
    made = trainer_of(folder, kappa=2.0, **SAVING)
    made.train()
    return made, folder


def history(made: Any) -> list[dict[str, float]]:
    volatile = ("runtime", "per_second", "train_loss")
    return [
        {key: value for key, value in entry.items() if not any(word in key for word in volatile)}
        for entry in made.state.log_history
    ]


# Before pl_start, while the pool fills, when it has just filled, and later, between two logs.
@pytest.mark.parametrize("stop", [1, 3, 4, 9])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    whole: tuple[Any, Path], tmp_path: Path, stop: int
) -> None:
    reference, folder = whole
    made = trainer_of(tmp_path, init=7, kappa=2.0, **SAVING)
    made.train(resume_from_checkpoint=str(folder / f"checkpoint-{stop}"))
    assert made.drawn == reference.drawn[stop:]
    assert tiny.same_bits(tiny.average(made), tiny.average(reference))
    assert tiny.same_bits(tiny.parameters(made.model), tiny.parameters(reference.model))
    assert history(made) == history(reference)
    last = f"checkpoint-{reference.state.global_step}"
    assert (tmp_path / last / CACHE_NAME).read_bytes() == (folder / last / CACHE_NAME).read_bytes()
    assert not (folder / CACHE_NAME).exists()


@pytest.mark.parametrize("kappa", [1.0, 3.0])
def test_another_kappa_continues_with_the_labels_in_the_cache(tmp_path: Path, kappa: float) -> None:
    first = StepLabeler()
    before = trainer_of(tmp_path / "before", first, kappa=2.0, save_strategy="steps", save_steps=2)
    before.train()
    labeler = StepLabeler()
    made = trainer_of(tmp_path / "after", labeler, init=7, kappa=kappa, max_example_loss=None)
    targets = trained_on(made)
    made.train(resume_from_checkpoint=str(tmp_path / "before" / "checkpoint-9"))
    assert made.sampler.step(8).end == 16.0 and made.state.global_step > 9
    expected = expected_steps(made)
    kept = {position: made_in(target) for position, target in targets.items() if target}
    assert kept == {position: expected[position] for position in kept}
    assert {step < 9 for step in kept.values()} == {True, False}
    items = sorted(item for step in made.drawn for item in step)
    assert items == sorted(item for step in before.drawn[9:] for item in step)


def test_a_checkpoint_without_its_labels_is_refused(whole: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = whole
    shutil.copytree(folder / "checkpoint-9", tmp_path / "checkpoint-9")
    (tmp_path / "checkpoint-9" / CACHE_NAME).unlink()
    with pytest.raises(IncompleteCheckpointError, match=f"{CACHE_NAME} is missing"):
        trainer_of(tmp_path / "run", kappa=2.0).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    (tmp_path / "checkpoint-9" / CHECKSUMS_NAME).unlink()
    with pytest.raises(LabelCacheError, match="is missing, but at this point of the run 12 labels are in the cache"):
        trainer_of(tmp_path / "run", kappa=2.0).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    # The labels of another moment are those of other items.
    shutil.copy(folder / "checkpoint-6" / CACHE_NAME, tmp_path / "checkpoint-9")
    with pytest.raises(LabelCacheError, match="holds other items"):
        trainer_of(tmp_path / "run", kappa=2.0).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


@pytest.mark.parametrize("pl", [{"cache_steps": 5.0}, {"cache_refresh": 0.5}, {"cache_steps": 0.0}], ids=str)
def test_another_cache_is_another_recipe_once_items_are_drawn(
    whole: tuple[Any, Path], tmp_path: Path, pl: dict[str, float]
) -> None:
    _, folder = whole
    made = trainer_of(tmp_path, kappa=2.0, pl=pl)
    with pytest.raises(ValueError, match=r"cache: \[4.0, 0.3\] then"):
        made.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    made.train(resume_from_checkpoint=str(folder / "checkpoint-1"))


def test_a_label_that_nobody_made_is_an_error(tmp_path: Path) -> None:
    made = trainer_of(tmp_path)
    made.train()
    pool, positions = made.sampler.stream.pool, made.sampler.positions
    number = next(n for n in range(10, STEPS) if (pool.entering[positions[n] : positions[n + 1]] >= 0).any())
    events = pool.events(int(positions[number]), int(positions[number + 1])).positions
    with pytest.raises(RuntimeError, match=f"no process labelled the items at stream positions .*{events[0]}"):
        made.cached_labels.labels(number, {}, [])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cache_steps": 0.5}, "cache_steps must be 0 .no cache. or at least 1 reference step, got 0.5"),
        ({"cache_steps": -1.0}, "got -1.0"),
        ({"cache_steps": float("inf")}, "got inf"),
        ({"cache_refresh": 0.0}, r"cache_refresh must lie in \(0, 1\], got 0.0"),
        ({"cache_refresh": 1.1}, "got 1.1"),
        ({"pl_ramp": -2.0}, "pl_ramp must be a number of reference steps of at least 0, got -2.0"),
        ({"pl_ramp": float("nan")}, "got nan"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.pseudo(**values)
