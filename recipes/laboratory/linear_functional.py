r"""Does t^p make a model learn a longer memory? Five families learn a functional whose memory is known.

    python recipes/laboratory/linear_functional.py

trains every family with every p and every seed, some minutes on two CPU cores, and draws the memory functions that
they found beside the true one. Targets, families, nonlinearity, depth and lengths are flags of `train_functional.py`;
those that `--vary` names are compared for every combination of their values:

    python recipes/laboratory/linear_functional.py --vary target=exponential,polynomial,shift,two_part,airy,sine \
        --model_type memory_linear_rnn --output_dir outputs/linear_functional_targets

In the sizes of the paper's author, hours:

    python recipes/laboratory/linear_functional.py --config recipes/laboratory/configs/linear_functional_author.yaml \
        --output_dir outputs/linear_functional_author_powers

The same command continues a comparison that was interrupted. Everything else is as in `compare_powers.py`.
"""

from __future__ import annotations

import sys

from recipes.laboratory.standing import FAMILIES, compare

STANDING = {
    "config": "configs/linear_functional.yaml",
    "powers": "0 4",
    "metric": "long_memory_error",
    "vary": f"target=polynomial,sine {FAMILIES}",
    "output_dir": "outputs/linear_functional_powers",
}

if __name__ == "__main__":
    sys.exit(compare("train_functional.py", STANDING, description=__doc__))
