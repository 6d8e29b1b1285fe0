"""Signs of collapse, one by one; and a planted collapse that is warned of, stopped and rolled back."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import collapse_runs
import numpy as np
import pytest
import tiny

from hf_ema_scaling.training.collapse import CollapseError, CollapseGuard, signs_of_collapse

HEALTHY = {
    "rows": 400.0,
    "pseudo/kept": 0.8,
    "pseudo/kl": 0.1,
    "pseudo/kl_limit": 1.1,
    "pseudo/distinct": 0.9,
    "pseudo/length_ratio": 0.8,
    "pseudo/dropped_empty": 0.1,
    "score/blank": 0.6,
    "loss/unlabelled": 1.0,
}


def test_a_healthy_window_shows_no_sign() -> None:
    assert signs_of_collapse(HEALTHY, None) == [] and signs_of_collapse(HEALTHY, HEALTHY) == []
    # Training goes well: more is kept, of more kinds, blanks sharpen, lengths grow towards those of gold.
    better = HEALTHY | {"pseudo/kept": 1.0, "score/blank": 0.85, "pseudo/length_ratio": 1.0, "loss/unlabelled": 0.2}
    assert signs_of_collapse(better, HEALTHY) == []
    # Three classes stay three where ten times as many labels are kept.
    few, many = ({"rows": n, "pseudo/kept": 1.0, "pseudo/distinct": 3 / n} for n in (60.0, 600.0))
    assert signs_of_collapse(many, few) == []


@pytest.mark.parametrize(
    ("changes", "just_not", "sign"),
    [
        ({"pseudo/kept": 0.0}, {"pseudo/kept": 0.01}, "none of 400 labels was kept"),
        ({"pseudo/kl": 0.89}, {"pseudo/kl": 0.88}, "labels are 0.89 nats from the labelled data"),
        (
            {"pseudo/dropped_empty": 0.51, "loss/unlabelled": 0.9},
            {"pseudo/dropped_empty": 0.5},
            "51% of labels",
        ),
        ({"pseudo/dropped_empty": 0.51, "loss/unlabelled": 0.9}, {"loss/unlabelled": 1.0}, "51% of labels are empty"),
        ({"score/blank": 0.961, "loss/unlabelled": 0.9}, {"score/blank": 0.96}, "96.1% of frames are blank"),
        ({"score/blank": 0.961, "loss/unlabelled": 0.9}, {"loss/unlabelled": 1.1}, "96.1% of frames are blank"),
        ({"pseudo/distinct": 0.22}, {"pseudo/distinct": 0.23}, "22.0% of labels are distinct, 90.0% before"),
        ({"pseudo/distinct": 0.22}, {"rows": 820.0}, "22.0% of labels are distinct"),
        ({"pseudo/length_ratio": 0.26}, {"pseudo/length_ratio": 0.27}, "labels are 0.26 times as long"),
        ({"pseudo/length_ratio": 2.41}, {"pseudo/length_ratio": 2.39}, "labels are 2.41 times as long"),
    ],
)
def test_each_sign_and_its_limit(changes: dict[str, float], just_not: dict[str, float], sign: str) -> None:
    signs = signs_of_collapse(HEALTHY | changes, HEALTHY)
    assert len(signs) == 1 and signs[0].startswith(sign)
    assert signs_of_collapse(HEALTHY | changes | just_not, HEALTHY) == []
    if not sign.startswith(("none", "labels are 0.89")):
        assert signs_of_collapse(HEALTHY | changes, None) == []


def test_empty_labels_that_leave_no_loss_at_all_are_a_sign() -> None:
    nothing = {"rows": 400.0, "pseudo/kept": 0.01, "pseudo/dropped_empty": 0.99}
    assert "99% of labels are empty, 10% before" in signs_of_collapse(nothing, HEALTHY)


def test_data_of_another_kind_is_no_collapse_as_long_as_it_stays_so() -> None:
    other = HEALTHY | {"pseudo/kl": 0.8}
    assert signs_of_collapse(other | {"pseudo/kl": 1.19}, other) == []
    assert len(signs_of_collapse(other | {"pseudo/kl": 1.21}, other)) == 1


def test_checkpoints_are_good_up_to_the_last_healthy_window() -> None:
    guard = CollapseGuard(10.0)
    guard.saved("checkpoint-1", 10.0)
    guard.saved("checkpoint-2", 15.0)
    assert guard.good() == [("checkpoint-1", 10.0)]
    assert guard.look(HEALTHY, 20.0) == []
    assert [name for name, _ in guard.good()] == ["checkpoint-2", "checkpoint-1"]
    guard.saved("checkpoint-3", 20.0)
    guard.saved("checkpoint-4", 25.0)
    # Those before the last good one are forgotten: a limit deletes them first.
    assert guard.good() == [("checkpoint-3", 20.0)]
    assert guard.look(HEALTHY | {"pseudo/kept": 0.0}, 30.0) != []
    guard.saved("checkpoint-5", 30.0)
    assert guard.good()[0] == ("checkpoint-3", 20.0)
    # A healthy window after all vouches for what lies before it.
    assert guard.look(HEALTHY, 40.0) == [] and guard.good()[0] == ("checkpoint-5", 30.0)
    other = CollapseGuard(10.0)
    other.load_state_dict(guard.state_dict())
    assert other.state_dict() == guard.state_dict() and other.good() == guard.good()


def test_weights_after_rollbacks() -> None:
    guard = CollapseGuard(10.0)
    clocks = np.array([5.0, 20.0, 29.999, 30.0, 42.0, 50.0])
    assert guard.weight(clocks).tolist() == [1.0] * 6
    guard.roll_back(20.0, 30.0)
    # What was decided survives the state of the checkpoint, once.
    guard.load_state_dict({"healthy_until": 20.0})
    assert guard.weight(clocks).tolist() == [1.0, 0.0, 0.0, 0.5, 0.5, 0.5]
    guard.roll_back(40.0, 50.0)
    guard.load_state_dict({})
    assert guard.weight(clocks).tolist() == [1.0, 0.0, 0.0, 0.5, 0.0, 0.25]
    guard.load_state_dict({})
    assert guard.weight(clocks).tolist() == [1.0] * 6


@pytest.mark.parametrize("kappa", [1.0, 4.0])
def test_a_healthy_run_raises_no_alarm(tmp_path: Path, kappa: float) -> None:
    made = collapse_runs.trainer(tmp_path, planted=False, kappa=kappa, pl={"on_collapse": "stop"})
    made.train()
    assert made.collapse.guard.alarms == [] and made.collapse.guard.healthy is not None
    assert made.collapse.guard.healthy_until == 40.0


def test_a_planted_collapse_is_warned_of_at_the_same_data_at_every_kappa(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for kappa in (1.0, 2.0):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            logging.getLogger("hf_ema_scaling").propagate = True
            # The rate that the rule for Adam does not make lower than the plant needs.
            made = collapse_runs.trainer(tmp_path / str(kappa), planted=True, kappa=kappa, scaling_rule="none")
            made.train()
        assert [clock for clock, _ in made.collapse.guard.alarms][:1] == [30.0]
        assert "nats from the labelled data" in made.collapse.guard.alarms[0][1][0]
        said = [record.message for record in caplog.records if "seem to have collapsed" in record.message]
        assert len(said) <= 2 and said[0].startswith("Pseudo-labels seem to have collapsed at reference step 30:")
        assert made.state.global_step == made.sampler.num_steps
        logs = [entry for entry in made.state.log_history if "pseudo/kl" in entry]
        assert logs[-1]["collapse/alarms"] >= 1 and logs[-1]["pseudo/kl"] > logs[-1]["pseudo/kl_limit"] * 0.8


@pytest.mark.parametrize("kappa", [0.5, 1.0, 2.0])
def test_one_class_at_a_time_is_a_collapse_though_a_window_has_them_all(tmp_path: Path, kappa: float) -> None:
    labeler = collapse_runs.InTurns()
    made = collapse_runs.trainer(tmp_path, planted=False, kappa=kappa, labeler=labeler, pl={"on_collapse": "stop"})
    labeler.step = lambda: int(made.state.global_step)
    with pytest.raises(
        CollapseError, match=r"of one class at a time: 0\.00% are not the most frequent class of their"
    ):
        made.train()
    ((clock, signs),) = made.collapse.guard.alarms
    assert clock == 20.0 and len(signs) == 1
    logs = [entry for entry in made.state.log_history if "pseudo/kl" in entry]
    # The rules for whole windows see nothing.
    assert logs[-1]["pseudo/kl"] < 0.2 and logs[-1]["pseudo/minority"] > 0.5


def test_classes_by_step_survive_a_checkpoint(tmp_path: Path) -> None:
    """A window of which half lies before the checkpoint is judged as if there had been none."""
    found = []
    for folder, checkpoint in (
        (tmp_path / "whole", None),
        (tmp_path / "resumed", tmp_path / "whole" / "checkpoint-15"),
    ):
        made = collapse_runs.trainer(folder, planted=False)
        seen: list[dict[str, float]] = []
        inner = made.collapse.guard.look

        def look(metrics: Any, clock: float, seen: Any = seen, inner: Any = inner) -> Any:
            seen.append({name: metrics[name] for name in metrics if "within" in name})
            return inner(metrics, clock)

        made.collapse.guard.look = look
        made.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        found.append(seen)
    whole, resumed = found
    assert whole == resumed and [one["within"] for one in whole] == [140.0] * 3
    # Three classes at random, 14 labels and up to 16 rows in a step.
    assert all(0.3 < one["pseudo/minority_within"] < 0.6 for one in whole)
    assert all(0.4 < one["pseudo/minority_within_labelled"] < 0.65 for one in whole)


def test_stop_ends_in_good_order_and_names_the_good_checkpoint(tmp_path: Path) -> None:
    made = collapse_runs.trainer(tmp_path, planted=True, pl={"on_collapse": "stop"})
    with pytest.raises(CollapseError) as raised:
        made.train()
    good = tmp_path / "checkpoint-20"
    assert f"The last good checkpoint is {good} (reference step 20)" in str(raised.value)
    assert f"train(resume_from_checkpoint={str(good)!r})" in str(raised.value)
    # No step after the alarm, nothing saved at it, and training was ended in order.
    assert made.state.global_step == 30 and not made.is_in_train
    saved = sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
    assert saved == [5, 10, 15, 20, 25] and (tmp_path / "ledger.json").exists()
    # From there a tamer run goes on.
    tame = collapse_runs.trainer(tmp_path, planted=False, pl={"on_collapse": "warn", "unlabeled_weight": 0.0})
    tame.train(resume_from_checkpoint=str(good))
    assert tame.state.global_step == 40


def test_stop_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    made = collapse_runs.trainer(tmp_path, planted=True, save_strategy="no", pl={"on_collapse": "stop"})
    with pytest.raises(CollapseError, match="There is no checkpoint from before the collapse"):
        made.train()
    assert made.state.global_step == 30


@pytest.fixture
def divergence_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the planted rate labelled rows alone end in one class as well, and the rule for that would go on and on."""
    monkeypatch.setattr("hf_ema_scaling.training.collapse.LEAST_MINORITY", math.inf)


def rolled_back(folder: Path, **changes: Any) -> Any:
    made = collapse_runs.trainer(folder, planted=True, pl={"on_collapse": "rollback"}, **changes)
    made.train()
    return made


@pytest.mark.usefixtures("divergence_alone")
def test_rollback_goes_on_from_the_good_checkpoint_as_a_resumed_run_would(tmp_path: Path) -> None:
    made = rolled_back(tmp_path / "run")
    guard = made.collapse.guard
    assert guard.pauses == [[20.0, 30.0]] and guard.alarms[0][0] == 30.0
    assert made.state.global_step == 40
    # What the collapse left is set aside.
    names = sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir() and "-" in path.name)
    assert "collapsed-checkpoint-25" in names and "checkpoint-25" in names and "collapsed-checkpoint-20" not in names
    # The same data was drawn twice from the checkpoint on.
    assert made.drawn[30:40] == made.drawn[20:30] and len(made.drawn) == 50
    # Before the alarm the weights had left; after it they are those of a run that resumed there by hand.
    by_hand = collapse_runs.trainer(tmp_path / "hand", planted=True, pl={"on_collapse": "warn"})
    by_hand.collapse.guard._decided = {"pauses": [[20.0, 30.0]]}
    by_hand.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-20"))
    assert tiny.same_bits(tiny.parameters(made.model), tiny.parameters(by_hand.model))
    assert tiny.same_bits(tiny.average(made), tiny.average(by_hand))
    assert not tiny.same_bits(made.recorder.weights[20], made.recorder.weights[30])
    # While labels are paused the gradient is that of labelled rows alone, and then half of their weight is left.
    weights = {round(e["clock/reference_step"]): e["pl/weight"] for e in made.state.log_history if "pl/weight" in e}
    assert weights == {20: 1.0, 30: 0.0, 40: 0.5}
    supervised = collapse_runs.trainer(
        tmp_path / "supervised", planted=True, pl={"on_collapse": "off", "unlabeled_weight": 0.0}
    )
    supervised.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-20"))
    for step in range(10):
        assert tiny.same_bits(made.recorder.gradients[30 + step], supervised.recorder.gradients[step])
    assert not tiny.same_bits(made.recorder.gradients[40], supervised.recorder.gradients[10])


@pytest.mark.usefixtures("divergence_alone")
def test_a_run_that_was_rolled_back_resumes_bit_for_bit(tmp_path: Path) -> None:
    made = rolled_back(tmp_path / "run")
    for stop in (25, 35):
        again = collapse_runs.trainer(tmp_path / str(stop), planted=True, pl={"on_collapse": "rollback"})
        again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{stop}"))
        assert again.collapse.guard.pauses == made.collapse.guard.pauses
        assert tiny.same_bits(tiny.parameters(again.model), tiny.parameters(made.model))


def test_rollbacks_that_do_not_help_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_ema_scaling.training.collapse.BACKOFF", 1.0)
    monkeypatch.setattr(CollapseGuard, "weight", lambda self, clocks: np.ones(len(clocks)))
    made = collapse_runs.trainer(tmp_path, planted=True, pl={"on_collapse": "rollback"})
    with pytest.raises(CollapseError, match=r"3 rollbacks have not helped.*The last good checkpoint is"):
        made.train()
    assert len(made.collapse.guard.pauses) == 3 and made.state.global_step == 30
    assert sorted(path.name for path in tmp_path.glob("collapsed-*")) == [
        "collapsed-checkpoint-25",
        "collapsed-checkpoint-25.2",
        "collapsed-checkpoint-25.3",
    ]


def test_off_does_not_look(tmp_path: Path) -> None:
    made = collapse_runs.trainer(tmp_path, planted=True, pl={"on_collapse": "off"})
    made.train()
    assert made.collapse.guard.alarms == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"save_strategy": "no"}, "goes back to a checkpoint"),
        ({"save_only_model": True}, "goes back to a checkpoint"),
        ({"save_total_limit": 2}, "save_total_limit=2 may delete the checkpoint .* up to 3 checkpoints belong to"),
        ({"save_total_limit": 9, "save_strategy": "epoch"}, "nobody knows how many are saved in"),
    ],
)
def test_a_rollback_needs_checkpoints(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collapse_runs.trainer(tmp_path, planted=True, pl={"on_collapse": "rollback"}, **changes)
    collapse_runs.trainer(tmp_path, planted=True, pl={"on_collapse": "rollback"}, save_total_limit=3)


def test_windows_with_few_rows_are_joined(tmp_path: Path) -> None:
    made = collapse_runs.trainer(tmp_path, planted=False, pl={"collapse_window": 1.0})
    seen: list[tuple[float, float]] = []
    inner = made.collapse.guard.look

    def look(metrics: Any, clock: float) -> Any:
        seen.append((clock, metrics["rows"]))
        return inner(metrics, clock)

    made.collapse.guard.look = look
    made.train()
    # Fourteen rows in a reference step: four of them are more than 50.
    assert seen == [(clock, 56) for clock in np.arange(14.0, 41.0, 4.0).tolist()]


LONG = {"collapse_window": 1000.0}
"""A window that no run here sees the end of."""


def silent(folder: Path, action: str, **changes: Any) -> Any:
    values = {"pl": {"on_collapse": action, **LONG}, "labeler": collapse_runs.Silent(), **changes}
    return collapse_runs.trainer(folder, planted=False, **values)


@pytest.fixture
def after_100_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fourteen rows in a reference step, from 10 on: eight steps are 112 of them."""
    monkeypatch.setattr("hf_ema_scaling.training.collapse_watch.LABELLESS_ROWS", 100)


@pytest.mark.usefixtures("after_100_rows")
@pytest.mark.parametrize("action", ["off", "warn", "stop"])
def test_a_teacher_that_labels_nothing_stops_the_run(tmp_path: Path, action: str) -> None:
    made = silent(tmp_path, action)
    with pytest.raises(
        CollapseError, match=r"reference step 18: none of the last 112 .*The last good check.* is .*-10 "
    ):
        made.train()
    assert made.state.global_step == 18 and not made.is_in_train
    sign = "none of the last 112 unlabelled rows got a label that is kept (112 empty)"
    assert made.collapse.guard.alarms == [[18.0, [sign]]]


@pytest.mark.usefixtures("after_100_rows")
def test_a_teacher_that_labels_nothing_goes_back(tmp_path: Path) -> None:
    made = silent(tmp_path / "rollback", "rollback")
    with pytest.raises(CollapseError, match="3 rollbacks have not helped"):
        made.train()
    assert made.collapse.guard.pauses == [[10.0, 18.0]] * 3


@pytest.mark.usefixtures("after_100_rows")
def test_what_is_counted_towards_it_resumes(tmp_path: Path) -> None:
    whole, again = silent(tmp_path / "whole", "warn"), silent(tmp_path / "again", "warn")
    with pytest.raises(CollapseError):
        whole.train()
    with pytest.raises(CollapseError):
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-15"))
    assert [clock for clock, _ in again.collapse.guard.alarms] == [18.0]
    assert again.collapse.guard.alarms == whole.collapse.guard.alarms
    # One label that is kept in a stretch is enough.
    kept = silent(tmp_path / "kept", "stop", labeler=collapse_runs.Silent(silent=False))
    kept.train()
    assert kept.collapse.guard.alarms == []
