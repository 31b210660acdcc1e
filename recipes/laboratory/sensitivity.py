r"""What does p do to gradients, and where is it too large? Gradient norm and loss through training.

    python recipes/laboratory/sensitivity.py

trains a tanh RNN and attention on a functional with p up to infinity at several learning rates, some minutes on two
CPU cores. Compared is the norm of the gradient, before it is clipped, its mean over the last steps; beside it stand
its spread from step to step, the unweighted loss and the memory errors. Everything else is as in `compare_powers.py`.
"""

from __future__ import annotations

import sys

from recipes.laboratory.standing import compare

STANDING = {
    "config": "configs/linear_functional.yaml",
    "powers": "0 1 4 10 inf",
    "metric": "grad_norm",
    "vary": "model_type=memory_tanh_rnn,memory_attention learning_rate=3e-3,3e-2",
    "logging_steps": "1",
    "output_dir": "outputs/sensitivity",
}

if __name__ == "__main__":
    sys.exit(compare("train_functional.py", STANDING, description=__doc__))
