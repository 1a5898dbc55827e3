from __future__ import annotations

from pathlib import Path

import pytest

from lemix_common.errors import BadInput
from lemix_studies.traces import TraceLine, read_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""
MOONCAKE = """{"timestamp": 3000, "input_length": 10, "output_length": 5, "hash_ids": [0]}
{"timestamp": 3000, "input_length": 20, "output_length": 6, "hash_ids": [0]}
{"timestamp": 6000, "input_length": 30, "output_length": 7, "hash_ids": [0]}
"""


def written(directory: Path, name: str, content: str) -> Path:
    """A trace file."""
    path = directory / name
    path.write_text(content)
    return path


def test_azure_times_are_counted_from_the_first_request(tmp_path: Path) -> None:
    """Seven digits of a second are read; the header is no request."""
    trace = read_trace(written(tmp_path, "a.csv", AZURE), seed=0)
    assert [(line.input_tokens, line.output_tokens) for line in trace] == [(374, 44), (396, 109)]
    assert [line.arrival_s for line in trace] == pytest.approx([0, 4.314579], abs=1e-5)


def test_mooncake_arrivals_are_spread_over_their_quantum(tmp_path: Path) -> None:
    """Requests of one 3 s tick come within it, in the file's order, and the seed fixes when."""
    path = written(tmp_path, "m.jsonl", MOONCAKE)
    trace = read_trace(path, seed=0)
    assert [line.input_tokens for line in trace] == [10, 20, 30]
    times = [line.arrival_s for line in trace]
    assert times == sorted(times)
    assert 0 <= times[0] < times[1] < 3 <= times[2] < 6
    assert read_trace(path, seed=0) == trace != read_trace(path, seed=1)


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.csv", AZURE + "yesterday,1,2\n", r"a\.csv:4: not a time"),
        ("a.csv", AZURE + "2023-11-16 18:15:51,1\n", r"a\.csv:4: not a time"),
        ("a.csv", AZURE + "2023-11-16 18:15:51,1,two\n", r"a\.csv:4: not a time"),
        ("a.csv", AZURE + "2023-11-16 18:15:51,1,-2\n", r"a\.csv:4: a negative"),
        ("a.csv", AZURE + "2023-11-16 18:15:40,1,2\n", r"a\.csv:4: arrives before"),
        ("a.csv", "query_tokens,reference_tokens\n1,2\n", r"a\.csv:1: not Azure's header"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests"),
        ("a.csv", "", "no requests"),
        ("m.jsonl", MOONCAKE + "{nonsense\n", r"m\.jsonl:4: not an object"),
        ("m.jsonl", MOONCAKE + "[1]\n", r"m\.jsonl:4: not an object"),
        ("m.jsonl", MOONCAKE + '{"timestamp": 9000}\n', r"m\.jsonl:4: not an object"),
        ("m.parquet", "", "not a trace"),
    ],
)
def test_an_unreadable_line_is_named(tmp_path: Path, name: str, content: str, where: str) -> None:
    """One clear error with file and line."""
    with pytest.raises(BadInput, match=where):
        read_trace(written(tmp_path, name, content), seed=0)


def test_a_line_that_is_no_text_is_named(tmp_path: Path) -> None:
    """Invalid UTF-8 says where."""
    path = tmp_path / "a.csv"
    path.write_bytes(AZURE.encode() + b"\xff\n")
    with pytest.raises(BadInput, match=r"a\.csv:4: not valid UTF-8 at byte 0"):
        read_trace(path, seed=0)


def test_a_missing_trace_is_refused(tmp_path: Path) -> None:
    """By its name."""
    with pytest.raises(BadInput, match=r"nothing\.csv can't be read: No such file"):
        read_trace(tmp_path / "nothing.csv", seed=0)


def test_the_first_request_is_at_zero(tmp_path: Path) -> None:
    """Whatever the clock said."""
    assert read_trace(written(tmp_path, "a.csv", AZURE), seed=0)[0] == TraceLine(0.0, 374, 44)
