from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from typer.testing import CliRunner

from hf_ema_scaling.cli import main
from hf_ema_scaling.recipe import ASR_CTC, build_asr_ctc, parse
from hf_ema_scaling.recipe.config import read_mapping
from hf_ema_scaling.recipe.planning import plan_recipe
from hf_ema_scaling.recipe.registry import RECIPES, RecipeKind, kind_of, kind_of_file
from hf_ema_scaling.training import EMATrainer, EMATrainingArguments


@dataclass
class WordArguments:
    rows: int = 12


def build_words(words: WordArguments, args: EMATrainingArguments) -> Any:
    return EMATrainer(tiny.bert(), args, train_dataset=tiny.sentences(words.rows))


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of another kind, which knows nothing of speech or pseudo-labels."""
    monkeypatch.setitem(RECIPES, "words", RecipeKind((WordArguments, EMATrainingArguments), build_words))
    path = tmp_path / "words.yaml"
    values = {"recipe": "words", "rows": 8, "reference_batch_size": 4, "max_steps": 8, "use_cpu": True}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def test_a_file_names_its_kind(words: Path, config: Path) -> None:
    assert kind_of_file(words) is RECIPES["words"]
    assert kind_of_file(config) is kind_of_file(None) is kind_of({}) is RECIPES["asr_ctc"]
    assert (RECIPES["asr_ctc"].arguments, RECIPES["asr_ctc"].build) == (ASR_CTC, build_asr_ctc)


@pytest.mark.parametrize("name", ["wrods", 3, None])
def test_an_unknown_kind_is_refused_with_those_known(words: Path, name: Any) -> None:
    words.write_text(yaml.safe_dump(read_mapping(words) | {"recipe": name}), encoding="utf-8")
    with pytest.raises(ValueError, match=f"words.yaml: recipe must be one of asr_ctc, .*words, got {name!r}"):
        kind_of_file(words)
    for command in ("plan", "check"):
        done = CliRunner().invoke(main, [command, str(words)])
        assert done.exit_code == 1 and f"got {name!r}" in done.output


def test_plans_know_the_arguments_of_the_kind(words: Path, config: Path) -> None:
    (plan,) = plan_recipe(words, ["--kappa", "2", "--rows", "4"])
    assert (len(plan), plan.recipe.pl_start) == (4, None)
    with pytest.raises(ValueError, match="no argument is called '--pl_start'"):
        plan_recipe(words, ["--pl_start", "2"])
    with pytest.raises(ValueError, match="no argument is called '--rows'"):
        plan_recipe(config, ["--rows", "4"])


def test_check_builds_the_kind(words: Path) -> None:
    done = CliRunner().invoke(main, ["check", str(words)])
    assert "labelled 8 rows" in done.stdout, done.output


def test_the_recipe_of_speech_may_say_so(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "named.yaml"
    path.write_text(yaml.safe_dump(read_mapping(config) | {"recipe": "asr_ctc"}), encoding="utf-8")
    argv = ["--output_dir", str(tmp_path)]
    assert parse(ASR_CTC, ["--config", str(path), *argv])[:3] == parse(ASR_CTC, ["--config", str(config), *argv])[:3]


def test_init_seed_is_of_new_weights_alone(config: Path, tmp_path: Path) -> None:
    def build(*argv: str) -> Any:
        return build_asr_ctc(*parse(ASR_CTC, ["--config", str(config), "--output_dir", str(tmp_path), *argv]))

    def same(a: Any, b: Any) -> bool:
        pairs = zip(a.model.parameters(), b.model.parameters(), strict=True)
        return all(torch.equal(left, right) for left, right in pairs)

    def order(made: Any) -> list[int]:
        return [draw.index for number in range(2) for draw in made.sampler.draws(number, 0)]

    base = build("--seed", "1")
    shared, other = build("--seed", "2", "--init_seed", "1"), build("--seed", "1", "--init_seed", "2")
    assert same(base, shared) and order(base) != order(shared)
    assert not same(base, other) and order(base) == order(other)
