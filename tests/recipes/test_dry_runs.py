"""Every configuration of `recipes/` takes two steps on tiny data, by its own script, as its file says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from dry_runs import COMMON, CONFIGS, SMALL, build_world, run_script, script_of, serve_hub, small
from safetensors.torch import load_file
from typer.testing import CliRunner

from hf_ema_scaling.cli import main
from hf_ema_scaling.recipe import parse
from hf_ema_scaling.recipe.config import read_mapping
from hf_ema_scaling.recipe.registry import RECIPES, kind_of_file
from hf_ema_scaling.recipe.sources import named_sources

ONE_OF_EACH_KIND = {
    "asr_ctc": "sweep_speech_pseudo",
    "asr_seq2seq": "whisper_asterisk",
    "byol": "byol_digits",
    "supervised": "vader_text",
    "text_classification": "minilm_vader",
    "token_classification": "minilm_twitter_ner",
    "translation": "wagtail_fr",
}
ON_HUB = {"ag_news": 3, "conll2003": 4, "librispeech_100_860": 4, "librispeech_whisper": 4, "wmt16_ro_en": 3}
"""How many data sets of the Hub a configuration asks for."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("world"))


def test_there_is_a_configuration_of_every_kind() -> None:
    assert ONE_OF_EACH_KIND.keys() == RECIPES.keys() and ON_HUB.keys() < CONFIGS.keys()
    for kind, name in ONE_OF_EACH_KIND.items():
        assert read_mapping(CONFIGS[name]).get("recipe", "asr_ctc") == kind == script_of(CONFIGS[name]).stem


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_two_steps(name: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    asked = serve_hub(monkeypatch, world)
    config, out = CONFIGS[name], tmp_path / "run"
    run_script(monkeypatch, script_of(config), "--config", str(config), "--output_dir", str(out), *small(name))
    assert len(asked) == ON_HUB.get(name, 0)
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["optimizer_steps"], metrics["reference_steps"]) == (2, 2)
    given = read_mapping(config)
    evaluation = given["evaluation"]
    sets = evaluation if isinstance(evaluation, dict) else named_sources(evaluation)
    for prefix in (f"eval_{ema}{name}" for ema in ("", "ema_") for name in sets):
        losses = [value for key, value in metrics.items() if key.startswith(prefix) and key.endswith("loss")]
        assert losses and all(map(math.isfinite, losses)), prefix
    logs = json.loads((out / "trainer_state.json").read_text())["log_history"]
    plan = json.loads((out / "scaling_plan.json").read_text())
    assert plan["recipe"]["pl_start"] == (1 if "unlabelled" in given else None)
    state = json.loads((out / "ema" / "ema_state.json").read_text())
    assert state["num_updates"] == 2
    assert plan["recipe"]["ema_momentum"] == given["ema_momentum"]
    student, average = (load_file(folder / "model.safetensors") for folder in (out, out / "ema"))
    assert student.keys() == average.keys() and logs
    moved = max(float((student[key].float() - average[key].float()).abs().max()) for key in student)
    assert 0 < moved < math.inf


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH_KIND.values())
def test_a_run_that_is_resumed_ends_on_the_same_bits(
    name: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    more = [*small(name), "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2", "--eval_strategy", "no"]
    more += ["--save_total_limit", "null", "--evaluation", "null"]
    more += ["--corruption", "0"] if "corruption" in read_mapping(CONFIGS[name]) else []
    through, resumed = tmp_path / "through", tmp_path / "resumed"
    for out, last in ((through, []), (resumed, ["--resume_from_checkpoint", str(through / "checkpoint-2")])):
        argv = ["--config", str(CONFIGS[name]), "--output_dir", str(out), *more, *last]
        run_script(monkeypatch, script_of(CONFIGS[name]), *argv)
        assert json.loads((out / "metrics.json").read_text())["optimizer_steps"] == 4
    early = through / "checkpoint-2" / "model.safetensors"
    assert early.read_bytes() != (through / "model.safetensors").read_bytes()
    for part in ("model.safetensors", "ema/model.safetensors"):
        assert (through / part).read_bytes() == (resumed / part).read_bytes()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_key_that_is_unknown_is_refused_and_5e_4_is_a_number(name: str, tmp_path: Path) -> None:
    text = CONFIGS[name].read_text(encoding="utf-8")
    path = tmp_path / "changed.yaml"
    path.write_text(f"{text}\nema_momentun: 0.9\n", encoding="utf-8")
    kind = kind_of_file(path)
    here = ["--config", str(path), "--output_dir", "o", "--use_cpu", "true", "--bf16", "false"]
    with pytest.raises(ValueError, match=r"changed\.yaml: no argument is called 'ema_momentun': did you mean ema_mom"):
        parse(kind.arguments, here)
    done = CliRunner().invoke(main, ["plan", str(path)])
    assert done.exit_code == 1 and "did you mean ema_momentum" in done.stderr
    lines = ["learning_rate: 5e-4" if line.startswith("learning_rate:") else line for line in text.splitlines()]
    path.write_text("\n".join(lines), encoding="utf-8")
    rates = [found.learning_rate for found in parse(kind.arguments, here) if hasattr(found, "learning_rate")]
    assert rates == [5e-4] and "learning_rate: 5e-4" in lines


def streaming_commands() -> list[list[str]]:
    """The commands of the README's paragraph on streaming, without `accelerate launch`."""
    text = (CONFIGS["ag_news"].parents[1] / "README.md").read_text(encoding="utf-8")
    block = text.split("**Streaming.**")[1].split("```")[1]
    words = [line.split() for line in block.replace("\\\n", " ").strip().splitlines()]
    assert all(line[:2] == ["accelerate", "launch"] for line in words)
    return [line[2:] for line in words]


def test_there_is_a_command_for_every_script_that_streams() -> None:
    assert [Path(line[0]).stem for line in streaming_commands()] == ["asr_ctc", "asr_seq2seq"]


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 1])
def test_a_recipe_streams_by_the_command_that_is_written(
    place: int, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    asked = serve_hub(monkeypatch, world)
    _, _, config, *flags = streaming_commands()[place]
    path = CONFIGS[Path(config).stem]
    # The number of workers is the command's own to say.
    pairs = zip(COMMON[::2], COMMON[1::2], strict=True)
    few = [word for pair in pairs if pair[0] != "--dataloader_num_workers" for word in pair]
    argv = ["--config", str(path), *flags, *few, "--pl_start", "1", *SMALL.get(path.stem, ())]
    argv += ["--output_dir", str(tmp_path)]
    run_script(monkeypatch, script_of(path), *argv)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["optimizer_steps"], metrics["reference_steps"]) == (2, 2)
    # Labelled speech, every split of the unlabelled, two evaluation sets.
    assert len(asked) == {"librispeech_100_860": 5, "librispeech_whisper": 4}[path.stem]
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    assert sum(entry["items"] for entry in ledger["used"]["unlabelled"].values()) > 0


def test_all_that_a_stream_cannot_do_is_said_at_once(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what to write is what the README writes."""
    monkeypatch.chdir(world)
    for script, _, config, *flags in streaming_commands():
        kind = RECIPES[Path(script).stem]
        argv = ["--config", str(CONFIGS[Path(config).stem]), "--use_cpu", "true", "--bf16", "false"]
        argv += ["--output_dir", "o", "--streaming", "true"]
        with pytest.raises(ValueError, match=r"^\d settings do not go with streams:") as caught:
            kind.build(*parse(kind.arguments, argv))
        message = str(caught.value)
        written = message.split("In their place write: ")[1].split()
        wanted = flags[flags.index("--streaming") + 2 :]
        names, values = wanted[::2], wanted[1::2]
        assert dict(zip(written[::2], written[1::2], strict=True)) == {
            name: "ROWS" if name == "--reference_batch_size" else value
            for name, value in zip(names, values, strict=True)
        }
        # The size of a batch in rows is no setting of its own.
        assert len(message.splitlines()) == 2 + len(names) - names.count("--reference_batch_size")
