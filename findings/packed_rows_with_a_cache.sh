#!/usr/bin/env bash
# transformers: packed rows are kept apart only where no cache is made, and a forward makes one by default.
#
# Documents that stand in one row, with position_ids that start again and no attention mask, do not see each other in a
# GPT-2 or a Llama: so DataCollatorWithFlattening promises. That holds with use_cache=False. With use_cache=True, which
# is the configuration's default, the second document's logits change with the first one's words, in eval and in train
# mode. Trainer sets use_cache=False on the model that it trains; who evaluates or scores packed rows without it gets
# other losses, without a warning.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cat > "$folder/look.py" <<'PY'
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

print("transformers", transformers.__version__, "torch", torch.__version__)
MODELS = {
    "GPT-2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=16, n_layer=2, n_head=2, n_positions=64)),
    "Llama": lambda: LlamaForCausalLM(
        LlamaConfig(vocab_size=97, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    ),
}
second = [20, 21, 22, 23]
positions = torch.tensor([[0, 1, 2, *range(len(second))]])
apart = {}
for name, make in MODELS.items():
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    for cache in (False, True):
        with torch.no_grad():
            one, other = (
                model(input_ids=torch.tensor([[*first, *second]]), position_ids=positions, use_cache=cache).logits
                for first in ([5, 6, 7], [50, 51, 52])
            )
        change = (one - other)[:, 3:].abs().max().item()
        apart[name, cache] = change < 1e-4
        print(f"{name}, use_cache={cache}: the second document's logits change by {change:.3f} with the first's words")
assert apart == {(name, cache): not cache for name in MODELS for cache in (False, True)}, apart
PY
"$folder/venv/bin/python" "$folder/look.py"
# Seen on 2026-11-29:
#   transformers 5.23.0 torch 2.13.0+cpu
#   GPT-2, use_cache=False: the second document's logits change by 0.000 with the first's words
#   GPT-2, use_cache=True: the second document's logits change by 4.340 with the first's words
#   Llama, use_cache=False: the second document's logits change by 0.000 with the first's words
#   Llama, use_cache=True: the second document's logits change by 3.447 with the first's words
