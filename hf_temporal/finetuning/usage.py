"""Python code for a model card, which loads the trained model and applies it to a text."""

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from .functional import LearnedFunctional
from .models import ModelArguments
from .tasks import Copying, Summarization, Task

CHAT = """
messages = [{{"role": "user", "content": {text}}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
""".strip()
PLAIN = 'inputs = tokenizer({text} + "\\n\\nSummary:\\n", return_tensors="pt")'
SOURCE = 'inputs = tokenizer({text}, truncation=True, max_length={max_length}, return_tensors="pt")'
TEXT = 'inputs = tokenizer(text, return_tensors="pt")'
SYMBOLS = 'inputs = tokenizer("{symbols}", add_special_tokens=False, return_tensors="pt")'

GENERATE = """
tokens = model.generate(**inputs, max_new_tokens={max_new_tokens}, num_beams={num_beams}, do_sample=False)
print(tokenizer.decode(tokens[0{answer}], skip_special_tokens=True))
""".strip()
SERIES = """
import torch
from transformers import AutoModel

model = AutoModel.from_pretrained({name!r}, trust_remote_code=True)
outputs = model(input_values=torch.randn(1, {time}, {size})).logits
""".strip()
READ_OFF = "print(tokenizer.decode(model(**inputs).logits.argmax(-1)[0, {places}]))"
AFTER_THE_PROMPT = ', inputs["input_ids"].shape[1] :'


def usage(
    task: Task,
    model_args: ModelArguments,
    tokenizer: PreTrainedTokenizerBase | None,
    config: PreTrainedConfig,
    *,
    name: str,
    num_beams: int,
) -> str:
    """The code for the model that is loaded as `name`; its variable `text` is the text to work on."""
    if isinstance(task, LearnedFunctional):
        return SERIES.format(name=name, time=task.arguments.length, size=config.input_size)
    lines = [*_load(model_args, config, name), _inputs(task, tokenizer, config)]
    if isinstance(task, Copying) and not task.generates and not config.is_encoder_decoder:
        symbols, places = task.example()
        at_the_end = places == [*range(len(symbols) - len(places), len(symbols))]
        return "\n".join([*lines, READ_OFF.format(places=f"-{len(places)}:" if at_the_end else places)])
    answer = "" if config.is_encoder_decoder else AFTER_THE_PROMPT
    length = task.answer_length or 64
    return "\n".join([*lines, GENERATE.format(max_new_tokens=length, num_beams=num_beams, answer=answer)])


def _load(model_args: ModelArguments, config: PreTrainedConfig, name: str) -> list[str]:
    kind = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
    imports = [f"from transformers import {kind}, AutoTokenizer"]
    trust = "" if type(config)._auto_class is None else ", trust_remote_code=True"
    load = f"{kind}.from_pretrained({name!r}{trust})"
    if model_args.use_peft and not model_args.merge_adapter:
        base = repr(model_args.model_name_or_path)
        imports.insert(0, "from peft import PeftModel")
        if model_args.model_name_or_path is None:
            base = "embedded_model_folder()"
            imports.append("from hf_temporal.data.embedded_model import embedded_model_folder")
        load = f"PeftModel.from_pretrained({kind}.from_pretrained({base}), {name!r})"
    return [*imports, "", f"model = {load}", f"tokenizer = AutoTokenizer.from_pretrained({name!r})"]


def _inputs(task: Task, tokenizer: PreTrainedTokenizerBase | None, config: PreTrainedConfig) -> str:
    if isinstance(task, Summarization):
        prefix = task.arguments.source_prefix
        text = f'"""{prefix}""" + text' if prefix else "text"
        if config.is_encoder_decoder:
            return SOURCE.format(text=text, max_length=task.arguments.max_source_length)
        return (CHAT if tokenizer is not None and tokenizer.chat_template else PLAIN).format(text=text)
    if isinstance(task, Copying) and not task.generates and tokenizer is not None:
        return SYMBOLS.format(symbols=tokenizer.decode(task.example()[0]))
    return TEXT
