"""The YAML files that come with the recipes: they parse, and the numbers in their comments are right."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from hf_ema_scaling.recipe import ASR_CTC, ASR_SEQ2SEQ, TEXT_CLASSIFICATION, TOKEN_CLASSIFICATION, TRANSLATION, parse
from hf_ema_scaling.recipe.asr_ctc import new_config
from hf_ema_scaling.recipe.config import read_mapping
from hf_ema_scaling.recipe.planning import plan_recipe
from hf_ema_scaling.recipe.sources import named_sources
from hf_ema_scaling.sweep import lay_out_sweep

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"


@pytest.mark.parametrize(
    ("name", "half_life", "kept"),
    [("asterisk_en", 1106, 0.0005), ("librispeech_100_860", 1386 * 1200, 0.0006)],
)
def test_configs(name: str, half_life: float, kept: float) -> None:
    argv = ["--config", str(CONFIGS / f"{name}.yaml"), "--use_cpu", "true", "--bf16", "false", "--output_dir", "o"]
    data, model, augmentation, args, pseudo = parse(ASR_CTC, argv)
    assert args.half_life(1.0) == pytest.approx(half_life, rel=1e-3)
    assert args.momentum(1.0) ** pseudo.pl_start == pytest.approx(kept, rel=0.1)
    assert augmentation.build() is not None
    config = new_config(model.model_config)
    stated = json.loads(model.model_config)["encoder_config"]
    assert {key: getattr(config.encoder_config, key) for key in stated} == stated
    assert all(data.evaluation_sources().values())


@pytest.mark.parametrize(("name", "start", "end"), [("polyak", 480, 800), ("pseudo", 720, 1040)])
def test_sweeps_of_speech(name: str, start: int, end: int, tmp_path: Path) -> None:
    settings = read_mapping(CONFIGS / f"sweep_speech_{name}.yaml")
    jobs = lay_out_sweep(settings, [0.5, 1, 2, 4, 8], [0], tmp_path)
    assert len(jobs) == 14 and {job.start for job in jobs} == {start}
    assert jobs[0].settings["eval_delay"] == start + 40
    for kappa, plan in zip([0.5, 8], plan_recipe(jobs[0].write_recipe(), kappas=[0.5, 8]), strict=True):
        assert plan.stages[-1].start == start and plan.borders[-1] == end
        assert kappa * (1 - plan.recipe.ema_momentum) < 0.1
        # The learning rate has come down before kappas part.
        last = plan.step(len(plan) - 1)
        assert plan.step(start).start == start
        assert plan.step(start).learning_rate == pytest.approx(2e-4 * kappa**0.5) == last.learning_rate
        if kappa == 8:
            assert last.momentum == pytest.approx(0.923, abs=5e-4)
    assert math.log(0.5) / math.log(0.99) == pytest.approx(69, abs=0.5)


@pytest.mark.parametrize(
    ("name", "kind", "half_life", "kept"),
    [
        ("minilm_vader", TEXT_CLASSIFICATION, 438, 0.0289),
        ("ag_news", TEXT_CLASSIFICATION, 1087, 0.017),
        ("minilm_twitter_ner", TOKEN_CLASSIFICATION, 364, 0.0076),
        ("conll2003", TOKEN_CLASSIFICATION, 2207, 0.012),
    ],
)
def test_configs_of_texts(name: str, kind: tuple[type, ...], half_life: float, kept: float) -> None:
    argv = ["--config", str(CONFIGS / f"{name}.yaml"), "--use_cpu", "true", "--bf16", "false", "--output_dir", "o"]
    data, model, views, *_, args, pseudo = parse(kind, argv)
    assert args.half_life(1.0) == pytest.approx(half_life, rel=1e-3)
    assert args.momentum(1.0) ** pseudo.pl_start == pytest.approx(kept, rel=0.05)
    assert named_sources(data.evaluation) and model.new_labels
    assert 0 <= views.mask_share < 0.5 and 0 <= views.word_dropout < 0.5
    (plan,) = plan_recipe(CONFIGS / f"{name}.yaml", kappas=[4])
    assert 4 * (1 - plan.recipe.ema_momentum) < 0.201 and plan.stages[-1].start == pseudo.pl_start


@pytest.mark.parametrize(
    ("name", "kind", "half_life", "kept"),
    [
        ("whisper_asterisk", ASR_SEQ2SEQ, 34.1, 0.039),
        ("librispeech_whisper", ASR_SEQ2SEQ, 14765, 0.0496),
        ("wagtail_fr", TRANSLATION, 2207, 0.0024),
        ("wmt16_ro_en", TRANSLATION, 44317, 0.018),
    ],
)
def test_configs_of_generating_models(name: str, kind: tuple[type, ...], half_life: float, kept: float) -> None:
    argv = ["--config", str(CONFIGS / f"{name}.yaml"), "--use_cpu", "true", "--bf16", "false", "--output_dir", "o"]
    data, model, *_, args, pseudo = parse(kind, argv)
    assert args.half_life(1.0) == pytest.approx(half_life, rel=1e-3)
    assert args.momentum(1.0) ** pseudo.pl_start == pytest.approx(kept, rel=0.1)
    room = model.max_label_tokens or data.max_length
    assert args.predict_with_generate and args.generation_max_length >= room
    assert named_sources(data.evaluation) and data.unlabelled
    (plan,) = plan_recipe(CONFIGS / f"{name}.yaml", kappas=[2])
    assert plan.stages[-1].start == pseudo.pl_start and plan.recipe.max_steps == args.max_steps
