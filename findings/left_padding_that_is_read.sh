#!/usr/bin/env bash
# transformers: decoders for which left padding is not masked, though they are generated from in left-padded batches.
#
# Decoder-only models are to be given prompts of several lengths padded on the left, with an attention mask, and
# `generate` warns where padding stands on the right. Of these four models only Mamba-2 then gives a prompt the logits
# that it has alone. xLSTM takes an attention mask and reads the padding all the same; RecurrentGemma masks it in its
# attention, and its recurrent layers read it; BART's decoder alone, as CausalLM, masks it and counts it in its learned
# positions. None warns.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0
cat > "$folder/look.py" <<'PY'
import torch
import transformers
from transformers import AutoModelForCausalLM, BartConfig, Mamba2Config, RecurrentGemmaConfig, xLSTMConfig

transformers.logging.set_verbosity_error()
print("transformers", transformers.__version__, "torch", torch.__version__)
common = {"vocab_size": 97, "hidden_size": 64, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
CONFIGS = {
    "Mamba-2": Mamba2Config(**common, num_hidden_layers=2, num_heads=8, head_dim=16, state_size=16, n_groups=1),
    "xLSTM": xLSTMConfig(**common, num_hidden_layers=2, num_heads=4, qk_dim_factor=1.0, chunk_size=16),
    "RecurrentGemma": RecurrentGemmaConfig(**common, num_hidden_layers=3, num_attention_heads=2, lru_width=64,
                                           num_key_value_heads=1, intermediate_size=64, attention_window_size=16),
    "BART's decoder": BartConfig(vocab_size=97, d_model=32, decoder_layers=2, decoder_attention_heads=2,
                                 decoder_ffn_dim=64, pad_token_id=0, is_decoder=True, is_encoder_decoder=False),
}
prompt = torch.randint(1, 97, (1, 9), generator=torch.Generator().manual_seed(0))
padding = torch.zeros(1, 4, dtype=torch.long)
padded = torch.cat([padding, prompt], 1)
mask = torch.cat([padding, torch.ones_like(prompt)], 1)
read = {}
for name, config in CONFIGS.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    with torch.no_grad():
        alone = model(input_ids=prompt, attention_mask=torch.ones_like(prompt)).logits[:, -1]
        behind = model(input_ids=padded, attention_mask=mask).logits[:, -1]
    change = float((behind - alone).abs().max() / alone.abs().max())
    read[name] = change > 0.01
    print(f"{name}: behind four tokens of padding the next token's logits change by {change:.3f} of the largest")
assert read == {"Mamba-2": False, "xLSTM": True, "RecurrentGemma": True, "BART's decoder": True}, read
PY
"$folder/venv/bin/python" "$folder/look.py"
# Seen on 2026-11-29:
#   transformers 5.24.0 torch 2.13.0+cpu
#   Mamba-2: behind four tokens of padding the next token's logits change by 0.000 of the largest
#   xLSTM: behind four tokens of padding the next token's logits change by 0.866 of the largest
#   RecurrentGemma: behind four tokens of padding the next token's logits change by 0.654 of the largest
#   BART's decoder: behind four tokens of padding the next token's logits change by 0.726 of the largest
