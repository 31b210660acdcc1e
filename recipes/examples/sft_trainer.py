"""`TemporalWeightSFTTrainer` in the place of TRL's `SFTTrainer`: a tiny Llama learns to repeat what it was shown.

    pip install trl
    python recipes/examples/sft_trainer.py

Seconds on a CPU, and nothing to download.
"""

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_temporal import use_padding_free
from hf_temporal.trl import TemporalSFTConfig, TemporalWeightSFTTrainer

words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1} | {f"w{number}": number for number in range(2, 64)}))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")

config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(config)

texts = [" ".join(f"w{number}" for number in range(first, first + 4)) for first in range(2, 50)]
examples = Dataset.from_list([{"prompt": text, "completion": f" {text}"} for text in texts])

args = TemporalSFTConfig(
    "outputs/example_sft_trainer",
    temporal_power=2.0,  # p: the weight of the k-th target token grows with k^p
    padding_free=use_padding_free(model),  # a batch is one row without padding, on CPUs, too
    max_length=None,
    max_steps=100,
    learning_rate=1e-2,
    use_cpu=True,
    bf16=False,
    report_to="none",
)
trainer = TemporalWeightSFTTrainer(
    model, args, train_dataset=examples, eval_dataset=examples, processing_class=tokenizer
)
trainer.train()
metrics = trainer.evaluate()
print(f"unweighted loss {metrics['eval_loss']:.3f}, of the last targets {metrics['eval_tail_loss']:.3f}")
