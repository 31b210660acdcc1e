r"""In how many steps do five families learn to copy digits over a blank, and what does p do to it?

    python recipes/laboratory/copying_memory.py

trains every family with every p and every seed on the copying problem of the literature, some minutes on two CPU
cores: L digits, a blank of length T, and the digits again. It counts the steps until they are recalled and draws
recall against steps and against p. Lengths are flags:

    python recipes/laboratory/copying_memory.py --blank_length 100 --copy_length 10 --model_type memory_attention \
        --vary learning_rate=1e-3,2e-3 --output_dir outputs/copying_memory_attention

In the sizes of the paper's author, days:

    python recipes/laboratory/copying_memory.py --config recipes/laboratory/configs/tcn_author.yaml --powers -1 0 1 2 10 100 \
        --vary copy_length=10,20,100,150 --output_dir outputs/copying_memory_author

The same command continues a comparison that was interrupted. Everything else is as in `compare_powers.py`.
"""

from __future__ import annotations

import sys

from recipes.laboratory.standing import FAMILIES, compare

STANDING = {
    "config": "configs/copying/small_attention.yaml",
    "powers": "0 4",
    "metric": "recall",
    "reach": "0.98",
    "vary": FAMILIES,
    "output_dir": "outputs/copying_memory_powers",
}

if __name__ == "__main__":
    sys.exit(compare("finetune_causal_lm.py", STANDING, description=__doc__))
