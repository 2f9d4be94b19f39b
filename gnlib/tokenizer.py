"""Tokenizers: trained on a text, read from a file, or fetched from Hugging Face; what encodes whole texts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gnlib import corpus
from gnlib.config import ConfigError, DataConfig
from gnlib.files import replacing

END_OF_TEXT = ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "[EOS]", "<|eot_id|>")  # the first one present


def tokenizer_file(name: str) -> Path | None:
    """The tokenizer.json that `name` is the path or the folder of; None for `bpe` and a name on Hugging Face."""
    here = Path(name).expanduser()
    path = here / "tokenizer.json" if here.is_dir() else here
    if name == "bpe" or not (path.is_file() or name.endswith(".json") or name.startswith((".", "/", "~"))):
        return None
    if not path.is_file():
        raise ConfigError(f"data.tokenizer: {path}: no such file; allowed: bpe, a tokenizer.json, a Hugging Face name")
    return path


def kept_tokenizer(config: DataConfig, saved: Path, text: Iterator[str]) -> Tokenizer:
    """Train it on `text` or load it, and keep a copy in `saved`, which a resumed preparation uses."""
    if not saved.exists():
        tokenizer = _trained(config.vocabulary, text) if config.tokenizer == "bpe" else _loaded(config.tokenizer)
        with replacing(saved) as temporary:
            tokenizer.save(str(temporary))
    return encoder(saved)


def encoder(saved: Path) -> Tokenizer:
    """The tokenizer of a file, set up to encode whole texts."""
    tokenizer = Tokenizer.from_file(str(saved))
    tokenizer.no_truncation()  # saved with many tokenizers, for the model that they came with
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "<eos>" in a text is five characters, not the end of a document
    return tokenizer


def _trained(vocabulary: int, text: Iterator[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def _loaded(name: str) -> Tokenizer:
    file = tokenizer_file(name)
    try:
        return Tokenizer.from_file(str(file)) if file else Tokenizer.from_pretrained(name)
    except Exception as error:  # tokenizers raises plain Exception; the hub a dozen types
        hint = "" if file else "; a name needs Hugging Face and the network, allowed besides: bpe, a tokenizer.json"
        raise ConfigError(f"data.tokenizer: cannot load {name}: {corpus.one_line(error)}{hint}") from None


def end_of_text(tokenizer: Tokenizer, name: str, vocabulary: int) -> int:
    """Its id; `ConfigError` without one, or if the model's vocabulary cannot hold the tokenizer's."""
    ids = tokenizer.get_vocab(with_added_tokens=True)
    size = max(ids.values()) + 1
    if size > vocabulary:
        raise ConfigError(f"data.vocabulary: {vocabulary} is too small for the tokenizer's {size} tokens")
    for token in END_OF_TEXT:
        if token in ids:
            return ids[token]
    raise ConfigError(f"data.tokenizer: {name} has no end-of-text token; one of {', '.join(END_OF_TEXT)}")
