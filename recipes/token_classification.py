"""Named entities with few labels: the average of the weights tags texts that have no tags.

    python scripts/prepare_minilm.py data/minilm
    python scripts/prepare_twitter_ner.py data/twitter_ner
    hf-ema-scaling check recipes/configs/minilm_twitter_ner.yaml
    accelerate launch recipes/token_classification.py --config recipes/configs/minilm_twitter_ner.yaml \\
        --output_dir runs/ner
    ... --unlabelled null                the same run on the labelled tweets alone
    python scripts/compare_arms.py runs/ner_arms --config recipes/configs/minilm_twitter_ner.yaml --metric f1

Every argument can stand in the YAML file or on the command line, which wins; `--help` lists them. Data paths are
relative to the working directory. `output_dir` receives the student, the average in `ema/` (both load with
`from_pretrained`), `metrics.json` and `scaling_plan.json`.
"""

from hf_ema_scaling.recipe import TOKEN_CLASSIFICATION, build_token_classification, main

if __name__ == "__main__":
    main(TOKEN_CLASSIFICATION, build_token_classification)
