#!/usr/bin/env bash
# transformers and the chat templates of DeepSeek: a call of a tool with content null cannot be rendered.
#
# OpenAI's files write "content": null beside tool_calls, and DeepSeek's templates ask whether `message['content']` is
# none for it. transformers 5.23 leaves out the keys whose value is null before the template sees the messages,
# so that the question itself raises: content is not none but undefined. With content "" that of DeepSeek-V3 writes the
# call, and that of the R1 distillations leaves it out without a word. Qwen2.5's template writes the call either way.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 jinja2==3.1.6
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps trl==1.16.0  # for its template files
cat > "$folder/look.py" <<'PY'
import sysconfig
from importlib.metadata import version
from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

print("transformers", version("transformers"), "trl", version("trl"))
templates = Path(sysconfig.get_paths()["purelib"]) / "trl" / "chat_templates"
call = {"type": "function", "function": {"name": "rain", "arguments": '{"city": "Oslo"}'}}
found = {}
for name in ("deepseekv3", "deepseek_r1_distill", "qwen2_5"):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    tokenizer.chat_template = (templates / f"{name}.jinja").read_text()
    for content in (None, ""):
        ask = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": content, "tool_calls": [call]}]
        try:
            found[name, content] = "rain" in tokenizer.apply_chat_template(ask, tokenize=False)
        except Exception as error:
            found[name, content] = f"{type(error).__name__}: {error}"
        print(name, "content", repr(content), "->", found[name, content])
raised = {name: str(found[name, None]) for name in ("deepseekv3", "deepseek_r1_distill")}
assert all("has no attribute 'content'" in text for text in raised.values()), raised
assert found["deepseekv3", ""] is True and found["deepseek_r1_distill", ""] is False, found
assert found["qwen2_5", None] is True and found["qwen2_5", ""] is True, found
PY
"$folder/venv/bin/python" "$folder/look.py"
# Seen on 2026-11-29:
#   transformers 5.23.0 trl 1.16.0
#   deepseekv3 content None -> UndefinedError: 'dict object' has no attribute 'content'
#   deepseekv3 content '' -> True
#   deepseek_r1_distill content None -> UndefinedError: 'dict object' has no attribute 'content'
#   deepseek_r1_distill content '' -> False
#   qwen2_5 content None -> True
#   qwen2_5 content '' -> True
