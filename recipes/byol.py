"""BYOL: representations of images without labels, with the average of the weights as the target network.

    accelerate launch recipes/byol.py --config recipes/configs/byol_digits.yaml --output_dir runs/byol
    accelerate launch recipes/byol.py --config recipes/configs/byol_digits.yaml --output_dir runs/byol16 \\
        --kappa 16 --small_batch_until 1000
    accelerate launch recipes/byol.py --config recipes/configs/byol_digits.yaml --output_dir runs/unscaled \\
        --kappa 16 --small_batch_until 1000 --scale_ema false

Every argument can stand in the YAML file or on the command line, which wins; `--help` lists them. `output_dir`
receives the student, the average in `ema/` (both load with `BYOLModel.from_pretrained`), `metrics.json` with the
accuracy of a linear probe on both (`eval_probe_accuracy`, `eval_ema_probe_accuracy`), and `scaling_plan.json`.
"""

from hf_ema_scaling.recipe import BYOL, build_byol, main

if __name__ == "__main__":
    main(BYOL, build_byol)
