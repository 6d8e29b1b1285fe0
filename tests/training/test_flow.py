"""Events on the reference clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import TrainerCallback


def run(folder: Path, **changes: Any) -> Any:
    values = {"logging_strategy": "steps", "eval_strategy": "steps", "save_strategy": "steps"}
    args = tiny.arguments(folder, **(values | changes))
    made = tiny.trainer(tiny.bert(), args, tiny.sentences(20), eval_dataset=tiny.sentences(4, 1))
    made.train()
    return made


def test_events_fire_at_the_first_step_that_crosses_a_multiple(tmp_path: Path) -> None:
    made = run(tmp_path, max_steps=20, kappa=3.0, small_batch_until=2, logging_steps=4, eval_steps=5, save_steps=6)
    # Steps end at 1, 2, 5, 8, 11, 14, 17, 20.
    assert made.state.max_steps == 8
    assert made.recorder.clocks("log") == [5, 8, 14, 17, 20]
    assert made.recorder.clocks("evaluate") == [5, 11, 17, 20]
    assert made.recorder.clocks("save") == [8, 14, 20]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-4",
        "checkpoint-6",
        "checkpoint-8",
    ]


def test_at_kappa_one_they_are_transformers_own(tmp_path: Path) -> None:
    made = run(tmp_path, max_steps=7, logging_steps=2, eval_steps=3, save_steps=5)
    assert made.recorder.clocks("log") == [2, 4, 6]
    assert made.recorder.clocks("evaluate") == [3, 6, 7]
    assert made.recorder.clocks("save") == [5, 7]


def test_intervals_below_one_are_shares_of_the_run(tmp_path: Path) -> None:
    made = run(tmp_path, max_steps=20, kappa=4.0, logging_steps=0.25, eval_steps=0.5, save_steps=0.5)
    assert made.recorder.clocks("log") == [8, 12, 16, 20]
    assert made.recorder.clocks("evaluate") == [12, 20]


def test_epochs_are_passes_over_the_labelled_set(tmp_path: Path) -> None:
    epochs = dict.fromkeys(("logging_strategy", "eval_strategy", "save_strategy"), "epoch")
    made = run(tmp_path, max_steps=-1, num_train_epochs=3, kappa=2.0, **epochs)
    # 20 items, 5 reference steps a pass: 15 reference steps, steps end at 2, 4, ..., 14, 15.
    assert made.state.max_steps == 8 and made.state.global_step == 8
    for name in ("log", "evaluate", "save"):
        assert made.recorder.clocks(name) == [6, 10, 15]


def test_eval_delay_counts_reference_steps(tmp_path: Path) -> None:
    made = run(tmp_path, max_steps=12, kappa=2.0, logging_steps=12, eval_steps=2, eval_delay=7, save_strategy="no")
    assert made.recorder.clocks("evaluate") == [8, 10, 12]


def test_logs_carry_the_clock_and_the_state_of_scaling(tmp_path: Path) -> None:
    made = run(
        tmp_path, max_steps=9, kappa=3.0, small_batch_until=3, logging_steps=3, eval_steps=6, save_strategy="no"
    )
    logs = [entry for entry in made.state.log_history if "loss" in entry]
    assert [entry["clock/reference_step"] for entry in logs] == [3, 6, 9]
    assert [entry["step"] for entry in logs] == [3, 4, 5]
    assert [entry["ema/kappa"] for entry in logs] == [1, 3, 3]
    assert [entry["ema/momentum"] for entry in logs] == pytest.approx([0.9, 0.729, 0.729])
    assert [entry["batch/units"] for entry in logs] == [4, 12, 12]
    assert logs[-1]["ema/distance"] == pytest.approx(made.average.distance(made.model), rel=1e-12)
    evaluations = [entry for entry in made.state.log_history if "eval_loss" in entry]
    assert [entry["clock/reference_step"] for entry in evaluations] == [6, 9]
    rates = [group[0]["lr"] for group in made.recorder.groups]
    assert [entry["learning_rate"] for entry in logs] == [rates[2], rates[3], rates[4]]


def test_logs_say_what_a_step_cut_at_a_stage_end_did(tmp_path: Path) -> None:
    made = run(
        tmp_path, max_steps=8, kappa=3.0, small_batch_until=1, logging_steps=1, eval_strategy="no", save_strategy="no"
    )
    logs = [entry for entry in made.state.log_history if "loss" in entry]
    assert [entry["clock/reference_step"] for entry in logs] == [1, 4, 7, 8]
    assert [entry["ema/kappa"] for entry in logs] == [1, 3, 3, 1]
    assert [entry["ema/momentum"] for entry in logs] == pytest.approx([0.9, 0.729, 0.729, 0.9], rel=1e-12)
    assert [entry["batch/units"] for entry in logs] == [4, 12, 12, 4]
    for step, weight in enumerate((0.1, 0.271, 0.271, 0.1)):
        before = made.recorder.averages[step - 1] if step else made.recorder.initial
        for name, average in made.recorder.averages[step].items():
            expected = before[name] + weight * (made.recorder.weights[step][name] - before[name])
            assert (average - expected).abs().max() < 1e-7, (step, name)


def test_below_the_reference_batch_events_wait_for_the_clock(tmp_path: Path) -> None:
    made = run(tmp_path, max_steps=4, kappa=0.5, logging_steps=1, eval_steps=2, save_steps=3)
    assert made.state.max_steps == 8 and [len(drawn) for drawn in made.drawn] == [2] * 8
    assert made.recorder.clocks("log") == [1, 2, 3, 4]
    assert made.recorder.clocks("evaluate") == [2, 4]
    assert made.recorder.clocks("save") == [3, 4]
    assert made.recorder.groups[0][0]["lr"] == pytest.approx(1e-2 * 0.5**0.5)


def test_logging_first_step(tmp_path: Path) -> None:
    made = run(tmp_path, max_steps=9, kappa=3.0, logging_steps=9, logging_first_step=True, eval_steps=9, save_steps=9)
    assert made.recorder.clocks("log") == [3, 9]


def test_the_logged_loss_is_the_mean_example_loss_of_the_steps_since_the_last_log(tmp_path: Path) -> None:
    """At learning rate 0, so that it can be computed afterwards."""
    data = tiny.sentences(12)
    made = tiny.at_fixed_weights(
        tiny.bert(), tiny.arguments(tmp_path, max_steps=3, logging_strategy="steps", logging_steps=3), data
    )
    logged = made.state.log_history[0]["loss"]
    # Three steps of four are one pass over the twelve rows.
    expected = made.evaluate(data)["eval_loss"]
    assert logged == pytest.approx(expected, rel=1e-5)


class Stop(TrainerCallback):
    """Raises the stop flag at an event of the optimizer step with this number."""

    def __init__(self, event: str, step: int) -> None:
        self.step = step
        setattr(self, event, self._raise)

    def _raise(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            control.should_training_stop = True


@pytest.mark.parametrize(
    ("event", "step"), [("on_step_end", 2), ("on_step_end", 4), ("on_log", 4), ("on_evaluate", 4), ("on_save", 4)]
)
def test_whoever_raises_the_stop_flag_is_heard_at_that_step(tmp_path: Path, event: str, step: int) -> None:
    """By a trainer with all the callbacks there are, before and after its teacher has begun to label."""
    labelled: list[int] = []

    class Labeler(tiny.ContentLabeler):
        def label(self, teacher: Any, batch: Any) -> Any:
            labelled.append(made.state.global_step)
            return super().label(teacher, batch)

    strategies = dict.fromkeys(("logging_strategy", "eval_strategy", "save_strategy"), "steps")
    steps = dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), 1)
    made = tiny.trainer(
        tiny.wav2vec2(),
        tiny.arguments(tmp_path, max_steps=6, **strategies, **steps),
        tiny.speech(12),
        eval_dataset=tiny.speech(3, 2),
        unlabeled_dataset=tiny.speech(12, 1, labels=False),
        pseudo_label_args=tiny.pseudo(pl_start=2.0),
        labeler=Labeler(),
        callbacks=[Stop(event, step)],
    )
    made.train()
    assert made.state.global_step == made.average.num_updates == len(made.recorder.weights) == step
    assert sorted(set(labelled)) == list(range(2, step))
    assert made.recorder.clocks("log") == made.recorder.clocks("evaluate") == list(range(1, step + 1))
    # The flag is no part of the checkpoint that was saved while it was up.
    made.remove_callback(Stop)
    made.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert made.state.global_step == made.average.num_updates == 6
