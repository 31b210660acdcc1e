"""`TemporalWeightTrainer` in the place of `Trainer`: a tiny Llama learns to repeat what it was shown.

    python recipes/examples/trainer.py

Seconds on a CPU, and nothing to download.
"""

from transformers import LlamaConfig, LlamaForCausalLM

from hf_temporal import TemporalTrainingArguments, TemporalWeightTrainer

config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(config)

examples = []  # a prompt of four tokens, which are no targets, and an answer that repeats them
for first in range(2, 50):
    prompt = list(range(first, first + 4))
    examples.append({"input_ids": prompt + prompt, "labels": [-100] * 4 + prompt})

args = TemporalTrainingArguments(
    "outputs/example_trainer",
    temporal_power=2.0,  # p: the weight of the k-th target token grows with k^p
    max_steps=40,
    learning_rate=1e-2,
    report_to="none",
)
trainer = TemporalWeightTrainer(model, args, train_dataset=examples, eval_dataset=examples)
trainer.train()
metrics = trainer.evaluate()
print(f"unweighted loss {metrics['eval_loss']:.3f}, of the last targets {metrics['eval_tail_loss']:.3f}")
