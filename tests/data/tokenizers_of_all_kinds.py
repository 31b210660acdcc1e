"""Small tokenizers of every kind, trained here on a few sentences: what a chat template's text becomes as tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "You are a helpful assistant. Be short and answer in one sentence, please.",
    "What is the weather in Paris today? It is sunny in Paris, and the wind is weak.",
    "user\n\nassistant\n\nsystem\n\ntool\n\nThe value of x is 12 and the value of y is 345.\n\n",
    "Let me think about it. First I have to add the numbers.\n\nThen I answer: 42.\n",
    "\n\n\n", "\n\n", ">\n\n", "|>\n", ".\n\n", "  two  spaces   three", "### Assistant:\n", "USER: ASSISTANT: ",
    '{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}', "[INST] [/INST] <<SYS>> <</SYS>>",
    "Ein schöner Tag, naïve façade, 你好世界, привет мир, 🙂.", "functions.get_weather to=assistant json commentary",
]  # fmt: skip
CORPUS = SENTENCES * 8

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(pattern: str, *, prefix_space: bool = False, composed: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if composed:
        tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False, min_frequency=2)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _with_bytes(trained: Tokenizer) -> Tokenizer:
    """The BPE model with a token for each byte, as SentencePiece's byte fallback has them."""
    vocabulary = trained.get_vocab()
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    merges: list[tuple[str, str]] = []
    known = sorted((index, token) for token, index in vocabulary.items() if len(token) > 1 and token[:3] != "<0x")
    for _, token in known:
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        merges += [pair for pair in pairs if all(half in vocabulary for half in pair)][:1]
    return Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))


def _sentencepiece_bpe() -> Tokenizer:
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[^▁\n]+|[▁\n]+"), behavior="isolated")
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>"], show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    return _with_bytes(trained)


def _legacy_llama() -> Tokenizer:
    """As Llama 2's: the space in front is written by a normalizer, before every piece between added tokens."""
    tokenizer = _sentencepiece_bpe()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _metaspace(scheme: str) -> Tokenizer:
    """As SentencePiece's newer ones: the space in front stands at the start of the text alone, always or never."""
    tokenizer = _sentencepiece_bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    metaspace = decoders.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence([metaspace, decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    alphabet = sorted({*"".join(SENTENCES).replace(" ", "▁"), *"<>|{}[]/\\_:;,.!?'\"#=+-*&%$@~^`()0123456789"})
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>"], unk_token="<unk>", initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _word_level() -> Tokenizer:
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    vocabulary = {word: index for index, word in enumerate(["<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


_MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "bytes-gpt2": lambda: _byte_level(_GPT2),
    "bytes-qwen": lambda: _byte_level(_QWEN),
    "bytes-composed": lambda: _byte_level(_QWEN, composed=True),
    "bytes-prefix-space": lambda: _byte_level(_GPT2, prefix_space=True),
    "bytes-eats-newlines": lambda: _byte_level(_QWEN),
    "bytes-no-chat-tokens": lambda: _byte_level(_QWEN),
    "llama-legacy": _legacy_llama,
    "metaspace-first": lambda: _metaspace("first"),
    "metaspace-never": lambda: _metaspace("never"),
    "metaspace-always": lambda: _metaspace("always"),
    "unigram": _unigram,
    "word-piece": _word_piece,
    "word-level": _word_level,
}
KINDS = list(_MAKERS)
EXACT = {"bytes-gpt2", "bytes-qwen", "bytes-no-chat-tokens"}  # decoding gives the text back to the last character
PLAIN_TOKENS = {"bytes-qwen", "metaspace-first", "word-piece"}  # their chat tokens are added ones, yet not special
ADDS_BOS = {"bytes-gpt2", "llama-legacy", "metaspace-first", "unigram"}


@cache
def _trained(kind: str) -> str:
    return str(_MAKERS[kind]().to_str())


@cache
def tokenizer_of(
    kind: str, template: str, tokens: tuple[str, ...], bos: str, eos: str, pad: str = "<pad>"
) -> PreTrainedTokenizerFast:
    """A tokenizer of one kind that has the template's own tokens.

    "bytes-eats-newlines" has them as Phi-3 does, each taking the white space behind it; "bytes-no-chat-tokens" has
    none of them but BOS and EOS, so that they are text like any other.
    """
    tokenizer = Tokenizer.from_str(_trained(kind))
    named = [bos, eos, pad]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in named])
    if kind in ADDS_BOS:
        bos_id = tokenizer.token_to_id(bos)
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $0", special_tokens=[(bos, bos_id)])
    if kind != "bytes-no-chat-tokens":
        own = [
            AddedToken(each, special=kind not in PLAIN_TOKENS, normalized=False, rstrip=kind == "bytes-eats-newlines")
            for each in tokens
            if each not in named
        ]
        (tokenizer.add_tokens if kind in PLAIN_TOKENS else tokenizer.add_special_tokens)(own)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        unk_token="<unk>" if tokenizer.token_to_id("<unk>") is not None else None,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
