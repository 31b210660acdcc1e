"""The LM head and its weighted loss without the logits: a public function, and a backend for each kind of device.

function.py       `weighted_linear_cross_entropy`: checks, autograd, one chunk of positions after the other
head.py           what the backends share: the head's matrices, their gradients, the size of a chunk
block_head.py     PyTorch alone, block of the vocabulary by block: CPUs, and GPUs without Triton
row_head.py       row of the logits by row, with the Triton kernel of triton_kernel.py
kernel_trial.py   that kernel beside PyTorch, on a few rows, before it is used
"""

from .function import weighted_linear_cross_entropy, weighted_linear_cross_entropy_terms

__all__ = ["weighted_linear_cross_entropy", "weighted_linear_cross_entropy_terms"]
