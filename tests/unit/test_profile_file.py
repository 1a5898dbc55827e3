from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lemix_common.costs import Cost, Profile, StageCosts
from lemix_common.errors import BadInput
from lemix_common.profile_file import profile_object, read_profile, write_profile

PROFILE = Profile(
    model="m",
    device="cpu",
    source="measured",
    stages=(
        StageCosts(
            forward=Cost(0.005, 0.0003, 7e-8),
            training_forward=Cost(0.011, 0.00034, 8e-8),
            backward=Cost(0.02, 0.0006, 3e-7),
            decode=Cost(0.007, 0.0004, 1e-6),
            optimizer_s=0.03,
            activation_bytes=Cost(token=1e4),
            kv_token_bytes=4096.0,
            weight_bytes=67_387_392,
            training_bytes=202_162_176,
            row_steps=((4, 4), (8, 1), (32, 4)),
        ),
    ),
    hop=Cost(1e-4, 5e-7),
    memory_bytes=2**34,
    load_s=0.2,
    held_out_error={"forward": 0.04},
)


def changed(*path: str | int, to: Any) -> dict[str, Any]:
    """The profile's JSON with another value in one place."""
    found: Any = json.loads(json.dumps(profile_object(PROFILE)))
    inner = found
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = to
    return dict(found)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Every figure comes back as it was, into folders that are made for it."""
    path = tmp_path / "profiles" / "m.json"
    write_profile(path, PROFILE)
    assert read_profile(path) == PROFILE
    assert [file.name for file in path.parent.iterdir()] == ["m.json"]


def test_a_profile_of_the_first_schema_is_read(tmp_path: Path) -> None:
    """There each row counts: nothing was known of steps."""
    path = tmp_path / "m.json"
    first = changed("schema", to=1)
    del first["stages"][0]["row_steps"]
    path.write_text(json.dumps(first), "utf-8")
    assert read_profile(path).stages[0].row_steps == ()


def test_a_line_that_was_not_measured_is_none(tmp_path: Path) -> None:
    """Of a training's forward there may be no figures of its own."""
    path = tmp_path / "m.json"
    path.write_text(json.dumps(changed("stages", 0, "training_forward", to=None)), "utf-8")
    assert read_profile(path).stages[0].training_forward is None


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (changed("schema", to=3), "its schema is 3, and 1 to 2 can be read"),
        (changed("source", to="guess"), "source is 'guess', not measured or roofline"),
        (changed("model", to=7), "model is 7, not a name"),
        (changed("stages", to=[]), "stages is not a list of stages"),
        (changed("stages", 0, "forward", to={"base": 1, "token": 1}), r"stages\[0\].forward has no context"),
        (changed("stages", 0, "colour", to="blue"), r"stages\[0\] has colour, which is unknown"),
        (
            changed("stages", 0, "decode", "token", to=-1),
            r"stages\[0\].decode.token is -1, not a number from 0",
        ),
        (changed("stages", 0, "row_steps", to=[[8, 0]]), r"stages\[0\].row_steps is not ascending from 1 on"),
        (changed("stages", 0, "row_steps", to=[[8, 1], [4, 4]]), r"row_steps is not ascending"),
        (changed("stages", 0, "row_steps", to=[[8, 1, 1]]), r"row_steps is not a list of pairs"),
        (changed("stages", 0, "row_steps", to=[8]), r"row_steps is not a list of pairs"),
        (changed("hop", "base", to=float("nan")), "hop.base is nan, not a number from 0 on"),
        (changed("memory_bytes", to=1.5), "memory_bytes is 1.5, not a whole number"),
        (changed("load_s", to=True), "load_s is True, not a number"),
        (changed("held_out_error", to=[]), "held_out_error is not an object"),
        ([1, 2], "its schema is None"),
    ],
)
def test_a_wrong_file_is_one_clear_error(tmp_path: Path, wrong: object, said: str) -> None:
    """It says the file, the place in it and what is wrong there."""
    path = tmp_path / "m.json"
    path.write_text(json.dumps(wrong), "utf-8")
    with pytest.raises(BadInput, match=rf"{path} is not a profile: .*{said}"):
        read_profile(path)


def test_what_is_no_json_or_not_there_is_said(tmp_path: Path) -> None:
    """A text, bytes that are none, and nothing at all."""
    path = tmp_path / "m.json"
    with pytest.raises(BadInput, match=r"can't be read.*`lemix profile` writes one"):
        read_profile(path)
    path.write_text("{", "utf-8")
    with pytest.raises(BadInput, match="is not a profile"):
        read_profile(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match="can't be read"):
        read_profile(path)
    with pytest.raises(BadInput, match="can't be written"):
        write_profile(path / "below", PROFILE)
