#!/usr/bin/env bash
# transformers: an RWKV that goes on from its state mixes the rows of a batch.
#
# `generate` hands an RWKV its state and one new token for each row. For a single row this gives what the whole sequence
# gives without a state. For a batch, even of rows of one length without any padding, it does not: the rows' answers
# are others than those that each row gets alone, without an error or a warning, and one row changes with the words of
# another. `use_cache=False` gives each row its own answer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0
cat > "$folder/look.py" <<'PY'
import torch
import transformers
from transformers import RwkvConfig, RwkvForCausalLM

print("transformers", transformers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
config = RwkvConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2, bos_token_id=None, eos_token_id=None)
model = RwkvForCausalLM(config).eval()
for parameter in model.parameters():
    if parameter.dim() > 1:
        torch.nn.init.normal_(parameter, std=0.5)
prompts = torch.randint(1, 97, (3, 6))


def answers(rows: torch.Tensor, use_cache: bool) -> torch.Tensor:
    mask = torch.ones_like(rows)
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "use_cache": use_cache}
    return model.generate(input_ids=rows, attention_mask=mask, **how)[:, rows.shape[1] :]


same = {}
for use_cache in (False, True):
    alone = torch.cat([answers(row[None], use_cache) for row in prompts])
    together = answers(prompts, use_cache)
    same[use_cache] = (together == alone).all(1).tolist()
    print(f"use_cache={use_cache}: rows with the answer that they get alone: {same[use_cache]}")
    if use_cache:
        others = answers(torch.cat([prompts[:2], prompts[2:] % 90 + 3]), use_cache)
        print("first row's answer with another third row beside it:", together[0].tolist(), others[0].tolist())
        changed = together[0].tolist() != others[0].tolist()
    else:
        expected = alone
print("alone, from the state and without it, the answers are the same:", bool((alone == expected).all()))
assert same == {False: [True] * 3, True: [False] * 3}, same
assert changed
assert (alone == expected).all()
PY
"$folder/venv/bin/python" "$folder/look.py"
# Seen on 2026-11-29:
#   transformers 5.24.0 torch 2.13.0+cpu
#   use_cache=False: rows with the answer that they get alone: [True, True, True]
#   use_cache=True: rows with the answer that they get alone: [False, False, False]
#   first row's answer with another third row beside it: [6, 21, 21, 43, 54, 86, 69, 78] [6, 70, 21, 95, 29, 86, 61, 54]
#   alone, from the state and without it, the answers are the same: True
