r"""Compare powers p of the weight t^p: a recipe with every p and every seed, each p tested against p = 0.

Thirty runs of a minute or two that answer whether p helps a small Llama to copy:

    python recipes/compare_powers.py recipes/finetune_causal_lm.py --config recipes/configs/copying/small_llama.yaml \
        --powers 0 0.5 1 2 4 10 --seeds 0 1 2 3 4 --metric recall --reach 0.98 --output_dir outputs/compare_copying

A quick try of all steps, about two minutes:

    python recipes/compare_powers.py recipes/finetune_causal_lm.py --config recipes/configs/copying/small_llama.yaml \
        --powers 0 1 --seeds 0 1 --metric recall --output_dir outputs/compare_copying_look --max_steps 2

Whether it depends on the blank and the learning rate: every combination is compared for itself, and one table holds
them all:

    python recipes/compare_powers.py recipes/finetune_causal_lm.py --config recipes/configs/copying/small_llama.yaml \
        --powers 0 1 4 --seeds 0 1 2 --metric recall --reach 0.98 --output_dir outputs/compare_copying_blanks \
        --vary blank_length=50,100 learning_rate=3e-4,1e-3

Flags that are not this script's own go to every run; they and the metric are checked before the first run starts. Each
run does what its own `accelerate launch` command would do; on the CPU, runs of one process without
`--accelerate_config` share their imports. The same command continues an interrupted comparison and keeps the finished
runs. It writes `summary.json`, `summary.md` and three pictures; with `--vary`, also those of each combination.

Flags may come from a file (`--grid recipes/laboratory/comparisons/copying_memory.yaml`); those on the command line
win. `--redraw FILE --output_dir FOLDER` writes the report and the pictures of a `summary.json` again.

`--dry_run` prints one `accelerate launch` command per run, for a cluster that sees the same folder. When its jobs have
ended, the command without `--dry_run` sums up the finished runs and starts the others:

    python recipes/compare_powers.py [as above] --dry_run | while IFS= read -r line; do sbatch --wrap "$line"; done
"""

import sys

from hf_temporal.compare.main import main

if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"compare_powers.py: {error}")
