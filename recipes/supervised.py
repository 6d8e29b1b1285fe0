"""Text classification with an average of the weights, on clean and on noisy test data.

    python scripts/prepare_vader.py data/vader
    hf-ema-scaling check recipes/configs/vader_text.yaml
    accelerate launch recipes/supervised.py --config recipes/configs/vader_text.yaml --output_dir runs/vader
    accelerate launch recipes/supervised.py --config recipes/configs/vader_text.yaml --output_dir runs/kappa8 --kappa 8
    accelerate launch recipes/supervised.py --config recipes/configs/vader_text.yaml --output_dir runs/unscaled \\
        --kappa 8 --scale_ema false
    accelerate launch recipes/supervised.py --config recipes/configs/vader_text.yaml --output_dir runs/fine_tuned \\
        --model_config null --model_name_or_path distilbert/distilbert-base-uncased --new_labels true

Every argument can stand in the YAML file or on the command line, which wins; `--help` lists them. Data paths are
relative to the working directory. `output_dir` receives the student, the average in `ema/` (both load with
`from_pretrained`), `metrics.json` and `scaling_plan.json`.
"""

from hf_ema_scaling.recipe import SUPERVISED, build_supervised, main

if __name__ == "__main__":
    main(SUPERVISED, build_supervised)
