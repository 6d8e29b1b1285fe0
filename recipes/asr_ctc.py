"""CTC speech recognition, with pseudo-labels from the average of the weights where there is unlabelled speech.

    python scripts/prepare_asterisk.py data/asterisk
    hf-ema-scaling check recipes/configs/asterisk_en.yaml
    accelerate launch recipes/asr_ctc.py --config recipes/configs/asterisk_en.yaml --output_dir runs/asterisk
    accelerate launch recipes/asr_ctc.py --config recipes/configs/asterisk_en.yaml --output_dir runs/kappa4 --kappa 4
    accelerate launch recipes/asr_ctc.py --config recipes/configs/asterisk_en.yaml --output_dir runs/labelled \\
        --unlabelled null
    accelerate launch recipes/asr_ctc.py --config recipes/configs/asterisk_en.yaml --output_dir runs/asterisk \\
        --resume_from_checkpoint true

Every argument can stand in the YAML file or on the command line, which wins; `--help` lists them. Data paths are
relative to the working directory. `output_dir` receives the student, the average in `ema/` (both load with
`from_pretrained`), `metrics.json` and `scaling_plan.json`.
"""

from hf_ema_scaling.recipe import ASR_CTC, build_asr_ctc, main

if __name__ == "__main__":
    main(ASR_CTC, build_asr_ctc)
