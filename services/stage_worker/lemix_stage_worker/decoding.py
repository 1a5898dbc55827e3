"""The cluster's tokenizer at a worker, which needs it for stop strings only: opened at the first of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from tokenizers import Tokenizer

from lemix_common.errors import ClusterError
from lemix_common.text_stream import Decode


def lazy_decoder(read_tokenizer: Callable[[], str]) -> Decode:
    """Decodes as clients do; the text of tokenizer.json is read when it is first called."""

    @cache
    def tokenizer() -> Tokenizer:
        text = read_tokenizer()
        if not text:
            raise ClusterError("the cluster publishes no tokenizer, so stop strings can't be looked for")
        return Tokenizer.from_str(text)

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer().decode(list(ids), skip_special_tokens=True))

    return decode
