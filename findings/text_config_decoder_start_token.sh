#!/usr/bin/env bash
# transformers: get_text_config(decoder=True) of an encoder-decoder loses decoder_start_token_id.
#
# A BlenderbotConfig made with decoder_start_token_id=3 says 3. Its get_text_config(decoder=True), which is there to read
# a decoder's settings alike from all kinds of configurations, says 1, the class's default, and an M2M100Config's says 2.
# A decoder that is fed by it starts with another token than the model's own forward feeds it, and the logits differ;
# nothing warns.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cat > "$folder/look.py" <<'PY'
import torch
import transformers
from transformers import BlenderbotConfig, BlenderbotForConditionalGeneration, M2M100Config

small = dict(
    vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
    init_std=0.2, dropout=0.0,
)
print("transformers", transformers.__version__, "torch", torch.__version__)
found = {}
for kind in (BlenderbotConfig, M2M100Config):
    config = kind(**small)
    found[kind.__name__] = (config.decoder_start_token_id, config.get_text_config(decoder=True).decoder_start_token_id)
    print(kind.__name__, "decoder_start_token_id:", found[kind.__name__][0], "by get_text_config:", found[kind.__name__][1])
torch.manual_seed(0)
model = BlenderbotForConditionalGeneration(BlenderbotConfig(**small)).eval()
source, labels = torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9, 10]])
with torch.no_grad():
    own = model(input_ids=source, labels=labels).logits
    fed = {start: model(input_ids=source, decoder_input_ids=torch.tensor([[start, 8, 9]])).logits for start in (1, 3)}
same = {start: torch.allclose(logits, own) for start, logits in fed.items()}
print("logits are the model's own with a decoder that starts with 3:", same[3], "- with 1:", same[1])
assert found == {"BlenderbotConfig": (3, 1), "M2M100Config": (3, 2)}, found
assert same == {1: False, 3: True}, same
PY
"$folder/venv/bin/python" "$folder/look.py"
# Seen on 2026-11-29:
#   transformers 5.23.0 torch 2.13.0+cpu
#   BlenderbotConfig decoder_start_token_id: 3 by get_text_config: 1
#   M2M100Config decoder_start_token_id: 3 by get_text_config: 2
#   logits are the model's own with a decoder that starts with 3: True - with 1: False
