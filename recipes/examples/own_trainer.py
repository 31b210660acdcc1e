"""`TemporalWeightMixin` in front of a trainer of one's own, whose extra term stays as it is.

    python recipes/examples/own_trainer.py

Seconds on a CPU, and nothing to download.
"""

from typing import Any

from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from hf_temporal import TemporalTrainingArguments, TemporalWeightMixin

PENALTY = 1e-4


class PenalizedTrainer(Trainer):
    """Adds a penalty on large logits to the model's loss."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The model's loss and the penalty."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss + PENALTY * outputs.logits.float().logsumexp(-1).square().mean()
        return (loss, outputs) if return_outputs else loss


class WeightedPenalizedTrainer(TemporalWeightMixin, PenalizedTrainer):
    """The same; the loss of the model is weighted by t^p, and the penalty is not."""


config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(config)

examples = []  # a prompt of four tokens, which are no targets, and an answer that repeats them
for first in range(2, 50):
    prompt = list(range(first, first + 4))
    examples.append({"input_ids": prompt + prompt, "labels": [-100] * 4 + prompt})

args = TemporalTrainingArguments(
    "outputs/example_own_trainer",
    temporal_power=2.0,  # p: the weight of the k-th target token grows with k^p
    max_steps=40,
    learning_rate=1e-2,
    report_to="none",
)
trainer = WeightedPenalizedTrainer(model, args, train_dataset=examples, eval_dataset=examples)
trainer.train()
metrics = trainer.evaluate()
print(f"unweighted loss {metrics['eval_loss']:.3f}, of the last targets {metrics['eval_tail_loss']:.3f}")
