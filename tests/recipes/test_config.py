from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dry_runs import CONFIGS, run_script, script_of

from hf_ema_scaling.recipe import ASR_CTC, parse

REQUIRED = "labelled: a.jsonl\nmodel_name_or_path: m\nreference_batch_size: 8\noutput_dir: o\nuse_cpu: true\n"


def parsed(tmp_path: Path, text: str, *argv: str) -> dict[str, Any]:
    config = tmp_path / "recipe.yaml"
    config.write_text(REQUIRED + text, encoding="utf-8")
    instances = parse(ASR_CTC, ["--config", str(config), *argv])
    return {name: value for instance in instances for name, value in vars(instance).items()}


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning_rate: 5e-4", "learning_rate", 5e-4),
        ("learning_rate: 1.5E-3", "learning_rate", 1.5e-3),
        ("learning_rate: '5e-4'", "learning_rate", 5e-4),
        ("learning_rate: 1", "learning_rate", 1.0),
        ("max_steps: 2e3", "max_steps", 2000),
        ("max_steps: 2_000", "max_steps", 2000),
        ("kappa: 4", "kappa", 4.0),
        ("kappa: null", "kappa", None),
        ("spec_augment: false", "spec_augment", False),
        ("scale_ema: no", "scale_ema", False),
        ("new_vocabulary: true", "new_vocabulary", True),
        ("eval_strategy: no", "eval_strategy", "no"),
        ("save_strategy: 'no'", "save_strategy", "no"),
        ("label_names: [labels, words]", "label_names", ["labels", "words"]),
        ("resume_from_checkpoint: true", "resume_from_checkpoint", "true"),
        ("lr_scheduler_kwargs: {min_lr_rate: 1e-2}", "lr_scheduler_kwargs", {"min_lr_rate": 0.01}),
        ("num_proc: 2", "num_proc", 2),
    ],
)
def test_values_become_what_the_argument_takes(tmp_path: Path, text: str, name: str, value: Any) -> None:
    found = parsed(tmp_path, text)[name]
    assert found == value and isinstance(found, type(value))


def test_structures_become_json(tmp_path: Path) -> None:
    stages = "batch_schedule:\n- {batch_size: 8, until: 5e1}\n- {batch_size: 64}"
    values = parsed(tmp_path, stages)
    assert json.loads(values["batch_schedule"]) == [{"batch_size": 8, "until": 50.0}, {"batch_size": 64}]


def test_the_command_line_wins(tmp_path: Path) -> None:
    values = parsed(
        tmp_path,
        "learning_rate: 5e-4\nkappa: 2\nunlabelled: u.jsonl\nspec_augment: false",
        *("--learning_rate", "1e-3", "--kappa", "8", "--unlabelled", "null", "--spec_augment", "true", "--labelled=b"),
    )
    assert (values["learning_rate"], values["kappa"], values["labelled"]) == (1e-3, 8.0, "b")
    assert values["unlabelled"] is None
    assert values["spec_augment"] is True


def test_required_arguments_without_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    values = parse(
        ASR_CTC,
        [
            "--labelled",
            "a",
            "--model_name_or_path",
            "m",
            "--reference_batch_size",
            "4",
            "--use_cpu",
            "--output_dir",
            "o",
        ],
    )
    assert values[0].labelled == "a" and values[3].reference_batch_size == 4.0
    with pytest.raises(SystemExit):
        parse(ASR_CTC, ["--model_name_or_path", "m"])
    assert "--labelled" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ema_momentun: 0.9", "'ema_momentun': did you mean ema_momentum"),
        ("kappa: 2\nkappa: 4", "kappa is given twice"),
        ("kappa: true", "kappa: takes no boolean, got True"),
        ("learning_rate: fast", "learning_rate: .*'fast'"),
        ("learning_rate: [1, 2]", r"learning_rate: takes one value, got \[1, 2\]"),
        ("max_steps: null", "max_steps: may not be null"),
        ("max_steps: 1.5", "max_steps: .*'1.5'"),
        ("eval_strategy: yes", "eval_strategy: takes no boolean, got True; quote"),
        ("eval_strategy: often", "eval_strategy: .*one of no, steps, epoch, got 'often'"),
        ("spec_augment: perhaps", "spec_augment: Truthy value expected"),
        ("text_case: upside", "text_case must be keep, lower or upper, got 'upside'"),
        ("model_config: {model_type: x}", "give model_name_or_path or model_config"),
        ("x: [", "recipe.yaml"),
    ],
)
def test_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parsed(tmp_path, text)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--kapa", "'--kapa': did you mean kappa"),
        ("--learning-rat", "did you mean learning_rate"),
        ("--learning_r=1", "no"),
    ],
)
def test_unknown_on_the_command_line(tmp_path: Path, argument: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parsed(tmp_path, "", argument, "4")


def test_a_file_that_is_no_mapping(tmp_path: Path) -> None:
    config = tmp_path / "list.yaml"
    config.write_text("- kappa", encoding="utf-8")
    with pytest.raises(ValueError, match=r"list.yaml must be a mapping of argument names to values, got list"):
        parse(ASR_CTC, ["--config", str(config)])


@pytest.mark.parametrize("name", ["asterisk_en", "whisper_asterisk", "minilm_vader", "vader_text", "byol_digits"])
def test_a_recipe_refuses_in_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = script_of(CONFIGS[name])
    with pytest.raises(SystemExit) as ended:
        run_script(
            monkeypatch, script, "--config", str(CONFIGS[name]), "--use_cpu", "true", "--bf16", "false", "--kapa", "4"
        )
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"{script.name}: error: no argument is called '--kapa': did you mean kappa?\n"


@pytest.mark.parametrize("text", ["bucket_window: null", "bucket_window: 0"])
def test_no_bucketing(tmp_path: Path, text: str) -> None:
    assert not parsed(tmp_path, text)["bucket_window"]
    assert parsed(tmp_path, "bucket_window: 8", "--bucket_window", "null")["bucket_window"] is None
