"""A tokenization for tests: bytes as tokens, with or without a first special token."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from lemix.tokenization import ModelCard, Tokenization, open_tokenization, tokenizer_sha256

BOS = 256


def bytes_tokenizer() -> str:
    """Each byte is a token; a text begins with the special token 256."""
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return str(tokenizer.to_str())


def words_tokenizer() -> str:
    """Llama's way: a space before each word, of which the text's first is dropped; bytes where no word fits."""
    vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    vocabulary |= {
        piece: 257 + number for number, piece in enumerate(["▁", "▁there", "▁was", "a", "e", "▁a"])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return str(tokenizer.to_str())


def tokenization(text: str | None = None, *, context_length: int = 32, vocab_size: int = 263) -> Tokenization:
    """The tokenization of a small model."""
    json_text = bytes_tokenizer() if text is None else text
    card = ModelCard(
        context_length=context_length, vocab_size=vocab_size, tokenizer_sha256=tokenizer_sha256(json_text)
    )
    return open_tokenization(card, json_text)
