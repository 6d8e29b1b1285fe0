"""Text classification with few labels: the average of the weights labels texts that have none.

    python scripts/prepare_minilm.py data/minilm
    python scripts/prepare_vader.py data/vader
    hf-ema-scaling check recipes/configs/minilm_vader.yaml
    accelerate launch recipes/text_classification.py --config recipes/configs/minilm_vader.yaml --output_dir runs/mv
    ... --kappa 4                        four times the batch from pl_start on
    ... --unlabelled null                the same run on the labelled sentences alone
    python scripts/compare_arms.py runs/arms --config recipes/configs/minilm_vader.yaml

Every argument can stand in the YAML file or on the command line, which wins; `--help` lists them. Data paths are
relative to the working directory. `output_dir` receives the student, the average in `ema/` (both load with
`from_pretrained`), `metrics.json` and `scaling_plan.json`.
"""

from hf_ema_scaling.recipe import TEXT_CLASSIFICATION, build_text_classification, main

if __name__ == "__main__":
    main(TEXT_CLASSIFICATION, build_text_classification)
