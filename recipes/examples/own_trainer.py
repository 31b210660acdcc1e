"""`TemporalWeightMixin` in front of a trainer of one's own, whose optimizer stays as it is.

    python recipes/examples/own_trainer.py

Seconds on a CPU, and nothing to download.
"""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from hf_temporal import TemporalTrainingArguments, TemporalWeightMixin


class SlowEmbeddingTrainer(Trainer):
    """Trains the embeddings at a tenth of the learning rate."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [{"params": []}, {"params": [], "lr": self.args.learning_rate / 10}]
        trained: Any = self.model if model is None else model
        for name, parameter in trained.named_parameters():
            groups["embed_tokens" in name]["params"].append(parameter)
        self.optimizer = torch.optim.AdamW(groups, lr=self.args.learning_rate)
        return self.optimizer


class WeightedSlowEmbeddingTrainer(TemporalWeightMixin, SlowEmbeddingTrainer):
    """The same, with the loss weighted by t^p; a `compute_loss` of the trainer's own would be called as well."""


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
trainer = WeightedSlowEmbeddingTrainer(model, args, train_dataset=examples, eval_dataset=examples)
trainer.train()
metrics = trainer.evaluate()
print(f"unweighted loss {metrics['eval_loss']:.3f}, of the last targets {metrics['eval_tail_loss']:.3f}")
