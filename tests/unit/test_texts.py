from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from lemix_common.errors import BadInput
from lemix_studies.texts import read_texts, take_tokens


def test_the_last_tenth_is_held_out(tmp_path: Path) -> None:
    """Rows of both parts keep their order."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"q{k}", "answer": f"a{k}"}) + "\n" for k in range(20)))
    texts = read_texts(path)
    assert texts.trained == tuple(f"q{k}\na{k}" for k in range(18))
    assert texts.held_out == ("q18\na18", "q19\na19")


def test_a_plain_text_is_cut_into_paragraphs(tmp_path: Path) -> None:
    """Blank lines part them."""
    path = tmp_path / "play.txt"
    path.write_text("First:\nhear me\n\n\nAll:\nspeak\n\nFirst:\nno\n")
    texts = read_texts(path)
    assert (texts.trained, texts.held_out) == (("First:\nhear me", "All:\nspeak"), ("First:\nno",))


@pytest.mark.parametrize("content", [b"", b"one paragraph", b"\xff\n\n\xff"])
def test_a_text_that_gives_nothing_is_refused(tmp_path: Path, content: bytes) -> None:
    """Empty, too little to hold anything out, or no text at all."""
    path = tmp_path / "play.txt"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"play\.txt: "):
        read_texts(path)


@pytest.mark.parametrize("wanted", [0, 1, 5, 6, 100])
def test_as_many_tokens_as_wanted(wanted: int) -> None:
    """Past the last document it goes on with the first; no more documents are encoded than needed."""
    encoded: list[str] = []

    def encode(text: str) -> list[int]:
        encoded.append(text)
        return [ord(letter) for letter in text]

    tokens = take_tokens(["ab", "cd", "ef"], wanted, encode, random.Random(1))
    whole = [ord(letter) for letter in "".join(encoded)]
    assert len(tokens) == wanted
    assert tokens == (whole * 100)[:wanted]
    assert len(encoded) == min(3, -(-wanted // 2))
