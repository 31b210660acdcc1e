"""`TemporalWeightSeq2SeqTrainer` in the place of `Seq2SeqTrainer`: a tiny T5 learns to repeat its input.

    python recipes/examples/seq2seq_trainer.py

Seconds on a CPU, and nothing to download.
"""

from transformers import T5Config, T5ForConditionalGeneration

from hf_temporal import TemporalSeq2SeqTrainingArguments, TemporalWeightSeq2SeqTrainer

config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0)
config.decoder_start_token_id = config.pad_token_id
model = T5ForConditionalGeneration(config)

examples = []  # four tokens as input, the same four as target; 1 is T5's end token
for first in range(2, 50):
    tokens = list(range(first, first + 4))
    examples.append({"input_ids": [*tokens, 1], "labels": [*tokens, 1]})

args = TemporalSeq2SeqTrainingArguments(
    "outputs/example_seq2seq_trainer",
    temporal_power=2.0,  # p: the weight of the k-th target token grows with k^p
    max_steps=40,
    learning_rate=1e-2,
    predict_with_generate=True,
    report_to="none",
)
trainer = TemporalWeightSeq2SeqTrainer(model, args, train_dataset=examples, eval_dataset=examples)
trainer.train()
metrics = trainer.evaluate()
print(f"unweighted loss {metrics['eval_loss']:.3f}, of the last targets {metrics['eval_tail_loss']:.3f}")
