"""Another dropout from the start of pseudo-labels on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from torch import nn

from hf_ema_scaling.training.dropout import DropoutChange


def test_every_probability_above_0_changes_and_comes_back() -> None:
    model = tiny.wav2vec2(dropout=0.3, layerdrop=0.2)
    model.wav2vec2.encoder.dropout.p = 0.0
    change = DropoutChange(model, 0.05)
    change.set(True)
    modules = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert sorted({module.p for module in modules}) == [0.0, 0.05] and model.wav2vec2.encoder.dropout.p == 0.0
    assert model.wav2vec2.encoder.layers[0].attention.dropout == 0.05
    config = model.config
    assert config.hidden_dropout == config.attention_dropout == 0.05 and config.layerdrop == 0.2
    with change.configs_as_given():
        assert config.hidden_dropout == 0.3 and modules[-1].p == 0.05
    assert config.hidden_dropout == 0.05
    change.set(False)
    assert {module.p for module in modules} == {0.0, 0.3} and config.hidden_dropout == 0.3
    with change.configs_as_given():
        pass
    assert config.hidden_dropout == 0.3


def test_configs_inside_of_configs_change_too() -> None:
    model = tiny.parakeet(dropout=0.2)
    DropoutChange(model, 0.0).set(True)
    assert model.config.encoder_config.dropout == 0.0 and model.config.encoder_config.attention_dropout == 0.0


def test_a_model_without_dropout_has_nothing_to_change() -> None:
    with pytest.raises(ValueError, match=r"pl_dropout=0\.1 changes nothing: BertForSequenceClassification has no"):
        DropoutChange(tiny.bert(), 0.1)


def run(folder: Path, *, dropout: float = 0.4, resume: str | None = None, kappa: float = 1.0, **pl: Any) -> Any:
    made = tiny.trainer(
        tiny.wav2vec2(dropout=dropout, seed=7 if resume else 0),
        tiny.arguments(folder, max_steps=6, kappa=kappa, save_strategy="steps", save_steps=1),
        tiny.speech(12),
        unlabeled_dataset=tiny.speech(14, 1, labels=False),
        pseudo_label_args=tiny.pseudo(**({"pl_start": 2.0} | pl)),
    )
    seen: list[tuple[float, bool]] = []
    made.model.lm_head.register_forward_pre_hook(
        lambda *_: seen.append((made.model.dropout.p, made.model.training)) if made.is_in_train else None
    )
    made.train(resume_from_checkpoint=resume)
    made.seen = [p for p, training in seen if training]
    return made


def test_dropout_changes_at_pl_start_and_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", pl_dropout=0.1)
    assert whole.seen == [0.4] * 2 + [0.1] * 8
    plain, weak = run(tmp_path / "plain"), run(tmp_path / "weak", dropout=0.1)
    for step in range(2):
        assert tiny.same_bits(whole.recorder.gradients[step], plain.recorder.gradients[step])
    assert not tiny.same_bits(whole.recorder.gradients[2], plain.recorder.gradients[2])
    assert not tiny.same_bits(whole.recorder.gradients[0], weak.recorder.gradients[0])
    # The teacher has none at all, and what is saved is the model as it was built.
    assert not whole.teacher.module.training
    for folder in ("checkpoint-5", "checkpoint-5/ema"):
        assert json.loads((tmp_path / "whole" / folder / "config.json").read_text())["hidden_dropout"] == 0.4
    assert whole.model.config.hidden_dropout == 0.1
    for stop in (1, 2, 4):
        resumed = run(tmp_path / f"from{stop}", pl_dropout=0.1, resume=str(tmp_path / "whole" / f"checkpoint-{stop}"))
        assert resumed.seen == whole.seen[-len(resumed.seen) :]
        assert tiny.same_bits(tiny.parameters(resumed.model), tiny.parameters(whole.model))


def test_the_change_is_at_the_same_place_at_every_kappa(tmp_path: Path) -> None:
    made = run(tmp_path, pl_dropout=0.1, kappa=4.0)
    assert [made.sampler.step(i).end for i in range(made.sampler.num_steps)] == [1, 2, 6]
    assert made.seen == [0.4, 0.4, 0.1, 0.1]
