"""Translation with few pairs: the average of the weights translates texts that have no translation.

    python scripts/prepare_wagtail.py data/wagtail
    hf-ema-scaling check recipes/configs/wagtail_fr.yaml
    accelerate launch recipes/translation.py --config recipes/configs/wagtail_fr.yaml --output_dir runs/wagtail
    ... --unlabelled null                the same run on the pairs alone
    python scripts/compare_arms.py runs/wagtail_arms --config recipes/configs/wagtail_fr.yaml --seeds 3 --metric cer

Every argument can stand in the YAML file or on the command line, which wins; `--help` lists them. Data paths are
relative to the working directory. `output_dir` receives the student, the average in `ema/` (both load with
`from_pretrained`), `metrics.json` and `scaling_plan.json`.
"""

from hf_ema_scaling.recipe import TRANSLATION, build_translation, main

if __name__ == "__main__":
    main(TRANSLATION, build_translation)
