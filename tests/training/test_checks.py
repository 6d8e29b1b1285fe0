"""What must not go unnoticed: a dead average, targets that CTC cannot learn, gradients that are not finite."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

from hf_ema_scaling.ema import DeadTeacherError, WeightAverage
from hf_ema_scaling.training.checks import (
    LivenessWatch,
    batch_statistics_of,
    check_ctc_targets,
    ctc_target_frames,
    drop_unfitting,
    frozen_statistics,
    gradient_difference,
    has_batch_statistics,
)


def bert_run(folder: Path, **changes: Any) -> Any:
    more = {key: changes.pop(key) for key in ("example_loss", "callbacks") if key in changes}
    return tiny.trainer(tiny.bert(), tiny.arguments(folder, **changes), tiny.sentences(30), **more)


def speech_run(folder: Path, **changes: Any) -> Any:
    return tiny.trainer(
        tiny.wav2vec2(),
        tiny.arguments(folder, **changes),
        tiny.speech(12),
        unlabeled_dataset=tiny.speech(12, 1, labels=False),
        labeler=tiny.ContentLabeler(),
    )


# ---- The average lives


def nothing(self: WeightAverage, model: nn.Module, weight: float) -> None:
    """The mutant: an update that is counted and not made."""
    self.num_updates += 1


@pytest.mark.parametrize("run", [bert_run, speech_run])
def test_an_average_that_is_never_updated_stops_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    made = run(tmp_path, max_steps=6)
    monkeypatch.setattr(WeightAverage, "blend", nothing)
    with pytest.raises(DeadTeacherError):
        made.train()
    assert made.state.global_step < 3


def test_an_average_that_stops_moving_is_seen_at_the_third_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bert_run(tmp_path, max_steps=6)
    monkeypatch.setattr(WeightAverage, "blend", nothing)
    with pytest.raises(DeadTeacherError, match="has not moved by one bit after 3 updates"):
        made.train()


def test_an_average_that_is_always_the_student_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blend = WeightAverage.blend
    monkeypatch.setattr(WeightAverage, "blend", lambda self, model, weight: blend(self, model, 1.0))
    with pytest.raises(DeadTeacherError, match="equals the student after 3 updates"):
        bert_run(tmp_path, max_steps=6).train()


def test_steps_without_a_learning_rate_prove_nothing(tmp_path: Path) -> None:
    made = bert_run(tmp_path, max_steps=6, learning_rate=0.0)
    before = tiny.parameters(made.model)
    made.train()
    assert made.state.global_step == 6 and tiny.same_bits(before, tiny.parameters(made.model))


def test_a_student_behind_detached_logits_is_seen(tmp_path: Path) -> None:
    """The gradient exists and is zero, so every weight keeps its bits."""

    def loss(model: nn.Module, inputs: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return logits.sum(-1) * 0.0

    with pytest.raises(DeadTeacherError, match="weights do not change"):
        bert_run(tmp_path, max_steps=6, example_loss=loss).train()


def test_a_teacher_that_ignores_the_average_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_ema_scaling.ema import EMATeacher

    frozen = tiny.wav2vec2(seed=5).eval()
    monkeypatch.setattr(EMATeacher, "__call__", lambda self, **inputs: frozen(**inputs))
    made = speech_run(tmp_path)
    with pytest.raises(DeadTeacherError, match="teacher is dead"):
        made.train()
    assert made.state.global_step == 0


def test_the_check_at_the_start_leaves_every_bit(tmp_path: Path) -> None:
    made = speech_run(tmp_path, max_steps=1)
    made.train()
    assert tiny.same_bits(made.recorder.initial, tiny.parameters(tiny.wav2vec2()))
    expected = {n: 0.9 * v + 0.1 * made.recorder.weights[0][n] for n, v in made.recorder.initial.items()}
    assert tiny.difference(expected, {n: tiny.average(made)[n] for n in expected}) < 1e-7


@pytest.mark.parametrize("action", ["raise", "skip"])
def test_weights_that_are_not_finite_never_enter_the_average(tmp_path: Path, action: str) -> None:
    """Adam without eps makes NaN of gradients that are zero: nothing of it may be averaged or saved."""
    made = bert_run(tmp_path, max_steps=6, adam_epsilon=0.0, on_nonfinite=action, save_strategy="steps", save_steps=1)
    with pytest.raises(FloatingPointError, match=r"is not finite after optimizer step 1, though its gradient was"):
        made.train()
    assert made.average.num_updates == 0
    assert tiny.same_bits(made.recorder.initial, {name: tiny.average(made)[name] for name in made.recorder.initial})
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_long_warmup_is_not_mistaken_for_death(tmp_path: Path) -> None:
    made = bert_run(
        tmp_path, max_steps=6, lr_scheduler_type="constant_with_warmup", warmup_steps=3, ema_momentum=0.999999
    )
    made.train()
    assert made.state.global_step == 6


def test_ema_start_delays_the_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bert_run(tmp_path, max_steps=6, ema_start=5).train()
    blend = WeightAverage.blend
    monkeypatch.setattr(WeightAverage, "blend", lambda self, model, weight: blend(self, model, 1.0))
    made = bert_run(tmp_path, max_steps=9, ema_start=4)
    with pytest.raises(DeadTeacherError, match="equals the student after 7 updates"):
        made.train()


def test_the_watch_counts_only_updates_that_float32_can_show() -> None:
    model = nn.Linear(3, 3)
    average = WeightAverage(model)
    watch = LivenessWatch(average)
    with torch.no_grad():
        model.weight += 1.0
    for _ in range(5):
        average.blend(model, 1e-9)
        assert not watch.after_update(model, average, 1e-9)
    assert watch.seen == 0
    for finished in (False, False, True):
        average.blend(model, 0.1)
        assert watch.after_update(model, average, 0.1) is finished


# ---- Gradients that are not finite


def poisoned(step: int, value: float) -> Any:
    """Cross-entropy with a factor of `value` in one optimizer step (one micro-batch each)."""
    calls: list[int] = []

    def loss(model: nn.Module, inputs: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        calls.append(len(calls))
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        return losses * value if calls[-1] == step else losses

    return loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_raise_keeps_weights_and_average_of_the_step_before(tmp_path: Path, value: float, clip: float) -> None:
    made = bert_run(tmp_path, max_grad_norm=clip, example_loss=poisoned(2, value), max_example_loss=None)
    with pytest.raises(FloatingPointError, match=r"optimizer step 2 \(reference step 2.0\).*on_nonfinite='skip'"):
        made.train()
    assert made.state.global_step == 2 and made.average.num_updates == 2
    assert tiny.same_bits(tiny.parameters(made.model), made.recorder.weights[1])
    assert tiny.same_bits(tiny.average(made), made.recorder.averages[1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_skip_moves_nothing_but_the_clock(tmp_path: Path, value: float, optim: str) -> None:
    made = bert_run(
        tmp_path,
        max_steps=12,
        kappa=2.0,
        optim=optim,
        on_nonfinite="skip",
        weight_decay=0.1,
        example_loss=poisoned(2, value),
        max_example_loss=None,
        logging_strategy="steps",
        logging_steps=2,
    )
    made.train()
    recorder = made.recorder
    assert made.state.global_step == 6 and made.average.num_updates == 5
    assert tiny.same_bits(recorder.weights[2], recorder.weights[1])
    assert tiny.same_bits(recorder.averages[2], recorder.averages[1])
    assert tiny.same_bits(recorder.after[2], recorder.after[1])
    assert not tiny.same_bits(recorder.weights[3], recorder.weights[2])
    logs = [entry for entry in made.state.log_history if "loss" in entry]
    assert [entry["clock/reference_step"] for entry in logs] == [2, 4, 6, 8, 10, 12]
    assert all(math.isfinite(entry["loss"]) for entry in logs)
    # The average catches nothing up: one more update is one update of 0.9 ** 2.
    name = "classifier.weight"
    expected = 0.81 * recorder.averages[2][name] + 0.19 * recorder.weights[3][name]
    torch.testing.assert_close(recorder.averages[3][name], expected, rtol=1e-6, atol=1e-7)


def always(*steps: int) -> Any:
    """As `poisoned`, in several steps."""
    calls = iter(range(1000))

    def loss(model: nn.Module, inputs: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        return losses * math.nan if next(calls) in steps else losses

    return loss


@pytest.mark.parametrize(("bad", "stops"), [((1, 2, 4, 5, 6, 7), 7), ((1, 2, 4, 5), None), ((0, 1, 2), 3)])
def test_too_many_skipped_steps_in_a_row_end_the_run(tmp_path: Path, bad: tuple[int, ...], stops: int | None) -> None:
    made = bert_run(
        tmp_path,
        max_steps=8,
        on_nonfinite="skip",
        max_skipped_steps=3,
        example_loss=always(*bad),
        max_example_loss=None,
        logging_strategy="steps",
        logging_steps=2,
    )
    if stops is None:
        made.train()
    else:
        first = stops - 2
        message = rf"3 optimizer steps in a row .* since step {first} \(reference step {first - 1}.0\), .* gradient"
        with pytest.raises(FloatingPointError, match=message):
            made.train()
    taken = [step for step in range(8 if stops is None else stops) if step not in bad]
    assert made.average.num_updates == len(taken)
    logs = [entry for entry in made.state.log_history if "loss" in entry]
    for number, entry in enumerate(logs, start=1):
        counted = [sum(step < end for step in bad) for end in (2 * number - 2, 2 * number)]
        assert (entry["skip/steps"], entry["skip/total"]) == (counted[1] - counted[0], counted[1])
    assert len(logs) == (4 if stops is None else (stops - 1) // 2)


def test_a_resumed_run_counts_skipped_steps_on(tmp_path: Path) -> None:
    bad = (2, 3, 4, 5)
    values: dict[str, Any] = {
        "max_steps": 8,
        "on_nonfinite": "skip",
        "max_example_loss": None,
        "logging_strategy": "steps",
        "logging_steps": 3,
        "save_strategy": "steps",
        "save_steps": 4,
    }
    whole = bert_run(tmp_path / "whole", example_loss=always(*bad), **values)
    whole.train()
    resumed = bert_run(tmp_path / "resumed", example_loss=always(0, 1), **values)
    checkpoint = str(tmp_path / "whole/checkpoint-4")
    resumed.train(resume_from_checkpoint=checkpoint)
    counts = [
        [(entry["skip/steps"], entry["skip/total"]) for entry in made.state.log_history if "loss" in entry]
        for made in (whole, resumed)
    ]
    assert counts[0] == counts[1] == [(1, 1), (3, 4)]
    texts = [(tmp_path / name / "checkpoint-8/ema/ema_state.json").read_text() for name in ("whole", "resumed")]
    assert texts[0] == texts[1] and json.loads(texts[0])["state"]["counters"]["skipped"]["total"] == 4
    # Two before the checkpoint and two after it are four in a row.
    stopped = bert_run(tmp_path / "stopped", example_loss=always(0, 1), **values, max_skipped_steps=4)
    with pytest.raises(FloatingPointError, match=r"4 optimizer steps in a row were skipped, all since step 3"):
        stopped.train(resume_from_checkpoint=checkpoint)
    assert stopped.average.num_updates == 2


def test_a_skipped_step_does_not_disturb_a_resume(tmp_path: Path) -> None:
    values = {
        "max_steps": 6,
        "on_nonfinite": "skip",
        "max_example_loss": None,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = bert_run(tmp_path / "whole", example_loss=poisoned(2, math.nan), **values)
    whole.train()
    made = bert_run(tmp_path / "resumed", example_loss=poisoned(-1, math.nan), **values)
    made.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-4"))
    assert tiny.same_bits(tiny.average(made), tiny.average(whole)) and made.average.num_updates == 5


class Keeps(BertForSequenceClassification):
    """Keeps all kinds of things that forward passes write."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.instances = nn.InstanceNorm1d(config.hidden_size, track_running_stats=True)
        self.batches = nn.BatchNorm1d(config.hidden_size)
        self.spectral = spectral_norm(nn.Linear(config.hidden_size, config.hidden_size))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("codes", torch.zeros(config.hidden_size))
        self.register_buffer("cache", torch.zeros(()), persistent=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:  # type: ignore[override]
        words = self.spectral(self.bert.embeddings.word_embeddings(input_ids)).transpose(1, 2)
        self.instances(words)
        self.batches(words)
        if self.training:
            self.seen += 1
            self.codes = 0.9 * self.codes + words.detach().mean((0, 2))  # another tensor each time
            self.cache += 1
        return super().forward(input_ids=input_ids, attention_mask=attention_mask)


class States(TrainerCallback):
    """The persistent buffers after each step."""

    def __init__(self) -> None:
        self.buffers: list[dict[str, torch.Tensor]] = []

    def on_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        names = {name for name, _ in model.named_parameters()}
        state = model.state_dict()
        self.buffers.append({name: value.clone() for name, value in state.items() if name not in names})


@pytest.mark.parametrize("scaled", [False, True])
def test_a_skipped_step_leaves_nothing_of_what_its_forward_passes_wrote(tmp_path: Path, scaled: bool) -> None:
    states = States()
    torch.manual_seed(0)
    made = tiny.trainer(
        Keeps(tiny.bert().config),
        tiny.arguments(tmp_path, max_steps=4, on_nonfinite="skip", max_example_loss=None),
        tiny.sentences(30),
        example_loss=poisoned(2, math.nan),
        callbacks=[states],
    )
    if scaled:
        made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    assert made.batch_statistics
    made.train()
    assert made.average.num_updates == 3
    own = ["instances.running_mean", "instances.running_var", "batches.running_var", "codes", "seen"]
    for name in own + [name for name in states.buffers[0] if name.startswith("spectral.parametrizations.weight.0.")]:
        _, before, skipped, after = (buffers[name] for buffers in states.buffers)
        assert tiny.same_bits(skipped, before), name
        assert not tiny.same_bits(after, skipped), name
    assert int(made.model.seen) == 3 and int(made.model.cache) == 4
    # A buffer that was put back is the one that the average follows.
    torch.testing.assert_close(made.average.tensors()["codes"], expected_codes(states), rtol=1e-6, atol=1e-7)


def expected_codes(states: States) -> torch.Tensor:
    """Weight 0.1 at each step that was taken, from zeros."""
    average = torch.zeros_like(states.buffers[0]["codes"])
    for step in (0, 1, 3):
        average = 0.9 * average + 0.1 * states.buffers[step]["codes"]
    return average


# ---- CTC targets


def test_frames_that_ctc_needs() -> None:
    labels = torch.tensor([[1, 2, 3, -100], [1, 1, 1, 2], [-100, -100, -100, -100], [5, 5, -100, -100]])
    assert ctc_target_frames(labels).tolist() == [3, 6, 0, 3]


def test_training_refuses_rows_without_tokens_or_frames(tmp_path: Path) -> None:
    import datasets

    rows = tiny.speech(6)[:]

    def with_labels(number: int, labels: list[int]) -> datasets.Dataset:
        every = [list(row) for row in rows["labels"]]
        every[number] = labels
        inputs = [row.tolist() for row in rows["input_values"]]
        return datasets.Dataset.from_dict({"input_values": inputs, "labels": every}).with_format("numpy")

    with pytest.raises(ValueError, match="labelled row 3 has no label tokens: drop such rows"):
        tiny.trainer(tiny.wav2vec2(), tiny.arguments(tmp_path), with_labels(3, [])).train()
    long = [1] * 30
    with pytest.raises(
        ValueError, match=r"labelled row 4 needs 59 frames for its labels, but the model makes \d\d of"
    ):
        tiny.trainer(tiny.wav2vec2(), tiny.arguments(tmp_path), with_labels(4, long)).train()


def test_a_target_of_exactly_the_models_frames_is_accepted() -> None:
    model = tiny.wav2vec2()
    inputs = {"input_values": torch.zeros(1, 32 * 5 + 3), "labels": torch.tensor([[1, 2, 1, 2, 1]])}
    frames = int(model._get_feat_extract_output_lengths(torch.tensor([32 * 5 + 3]))[0])
    assert frames == 5
    check_ctc_targets(model, inputs, [0])
    with pytest.raises(ValueError, match="row 8 needs 6 frames"):
        check_ctc_targets(model, inputs | {"labels": torch.tensor([[1, 2, 1, 2, 2]])}, [8])


# ---- Small parts


def test_batch_statistics_are_found_and_frozen() -> None:
    assert has_batch_statistics(tiny.parakeet()) and not has_batch_statistics(tiny.wav2vec2())
    norm = nn.BatchNorm1d(3)
    with frozen_statistics(norm):
        norm(torch.randn(4, 3))
        assert int(norm.num_batches_tracked) == 0 and not norm.training
    assert norm.training
    norm.eval()
    with frozen_statistics(norm):
        pass
    assert not norm.training
    assert not has_batch_statistics(nn.InstanceNorm1d(3))  # keeps nothing of what it saw
    kept = nn.InstanceNorm1d(3, track_running_stats=True)
    assert has_batch_statistics(kept) and len(batch_statistics_of(kept)) == 3
    with frozen_statistics(kept):
        kept(torch.randn(4, 3, 5))
    assert int(kept.num_batches_tracked) == 0 and kept.training


def test_gradient_difference_is_relative() -> None:
    a = {"x": torch.tensor([3.0, 4.0])}
    assert gradient_difference(a, {"x": torch.tensor([3.0, 4.5])}) == pytest.approx(0.1)
    zero = {"x": torch.zeros(2)}
    assert gradient_difference(zero, zero) == 0.0 and gradient_difference(zero, a) == 1.0


def test_unlabelled_rows_need_one_frame(caplog: pytest.LogCaptureFixture) -> None:
    rows = [np.zeros(length, dtype=np.float32) for length in (31, 32, 5, 640)]
    data = datasets.Dataset.from_dict({"input_values": rows})
    model = tiny.wav2vec2()  # a frame for each 32 samples
    with caplog.at_level("WARNING"):
        kept = drop_unfitting(model, data, "somewhere")
    assert [len(row) for row in kept["input_values"]] == [32, 640]
    assert "dropped 2 of 4 rows of somewhere: they make no frame" in caplog.text
    with pytest.raises(ValueError, match="no row of somewhere fits"):
        drop_unfitting(model, data.select([0, 2]), "somewhere")
