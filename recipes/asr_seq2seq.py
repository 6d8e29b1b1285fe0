"""Speech recognition with a decoder (Whisper and others), with pseudo-labels where there is unlabelled speech.

    python scripts/prepare_whisper.py data/whisper-tiny-en
    python scripts/prepare_asterisk.py data/asterisk
    hf-ema-scaling check recipes/configs/whisper_asterisk.yaml
    accelerate launch recipes/asr_seq2seq.py --config recipes/configs/whisper_asterisk.yaml --output_dir runs/whisper
    ... --unlabelled null                the same run on labelled speech alone
    python scripts/compare_arms.py runs/whisper_arms --config recipes/configs/whisper_asterisk.yaml --seeds 3 \\
        --metric wer

Every argument can stand in the YAML file or on the command line, which wins; `--help` lists them. Data paths are
relative to the working directory. `output_dir` receives the student, the average in `ema/` (both load with
`from_pretrained`), `metrics.json` and `scaling_plan.json`.
"""

from hf_ema_scaling.recipe import ASR_SEQ2SEQ, build_asr_seq2seq, main

if __name__ == "__main__":
    main(ASR_SEQ2SEQ, build_asr_seq2seq)
