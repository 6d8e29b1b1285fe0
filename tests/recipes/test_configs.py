"""The YAML files that come with the recipes: they parse, and the numbers in their comments are right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_ema_scaling.recipe import ASR_CTC, parse
from hf_ema_scaling.recipe.asr_ctc import new_config

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
