r"""Compare powers p of the weight t^p: a recipe with every p and every seed, each p tested against p = 0.

Thirty runs of a minute or two, which answer whether p helps a small Llama to copy:

    python recipes/compare_powers.py recipes/finetune_causal_lm.py --config recipes/configs/copying/small_llama.yaml \
        --powers 0 0.5 1 2 4 10 --seeds 0 1 2 3 4 --metric recall --reach 0.98 --output_dir outputs/compare_copying

A look at the whole way in about two minutes:

    python recipes/compare_powers.py recipes/finetune_causal_lm.py --config recipes/configs/copying/small_llama.yaml \
        --powers 0 1 --seeds 0 1 --metric recall --output_dir outputs/compare_copying_look --max_steps 2

Does it depend on the blank and the learning rate? Every combination is compared for itself, all of them in one table:

    python recipes/compare_powers.py recipes/finetune_causal_lm.py --config recipes/configs/copying/small_llama.yaml \
        --powers 0 1 4 --seeds 0 1 2 --metric recall --reach 0.98 --output_dir outputs/compare_copying_blanks \
        --vary blank_length=50,100 learning_rate=3e-4,1e-3

Every flag that is not one of this script goes to every run. Each is what its own `accelerate launch` command is, but
without `--accelerate_config` the runs of one process on the CPU make their imports once for all. The same command
continues a comparison that was interrupted: runs that are finished are kept. It writes `summary.json`, `summary.md`
and three pictures; with `--vary` a report and pictures into a folder for each combination, too.

Flags may come from a file (`--grid recipes/laboratory/comparisons/copying_memory.yaml`); those on the command line
win. The report and the pictures of a `summary.json` are made again by `--redraw FILE --output_dir FOLDER`.

With `--dry_run` it prints one `accelerate launch` command per run, for a cluster that sees the same folder; once its
jobs have ended, the command without `--dry_run` finds the finished runs there, and makes up for those that failed:

    python recipes/compare_powers.py [as above] --dry_run | while IFS= read -r line; do sbatch --wrap "$line"; done
"""

import sys

from hf_temporal.compare.main import main

if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"compare_powers.py: {error}")
