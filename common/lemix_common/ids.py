"""Names of things, as types, so that one can't be passed for another."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from typing import NewType

from lemix_common.errors import BadInput

ItemId = NewType("ItemId", str)
RunId = NewType("RunId", str)
WorkerId = NewType("WorkerId", str)
OperationId = NewType("OperationId", str)
NodeIndex = NewType("NodeIndex", int)
StageIndex = NewType("StageIndex", int)

_ITEM_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


@dataclass(frozen=True, slots=True, order=True)
class Version:
    """A weight version ``LINEAGE.STEP`` of a run: equal versions have equal bits."""

    lineage: int
    step: int

    def __str__(self) -> str:
        return f"{self.lineage}.{self.step}"

    @classmethod
    def parse(cls, text: str) -> Version:
        """Read ``"0.12"``; anything else is a `BadInput`."""
        lineage, dot, step = text.partition(".")
        if not (dot and lineage.isdecimal() and step.isdecimal()):
            raise BadInput(f"{text!r} is not a weight version (expected LINEAGE.STEP, for instance 0.12)")
        return cls(int(lineage), int(step))

    def after(self, steps: int) -> Version:
        """The version that many steps later in the same lineage."""
        return Version(self.lineage, self.step + steps)


BASE_VERSION = Version(0, 0)
"""The weights of the model folder, before any step."""


def new_item_id() -> ItemId:
    """A fresh item id; time-ordered ids aren't needed, the submission stream has the order."""
    return ItemId(uuid.uuid4().hex)


def check_item_id(text: str) -> ItemId:
    """A caller's own item id, or a `BadInput` that says which characters are allowed."""
    if not _ITEM_ID.fullmatch(text):
        raise BadInput(f"item id {text[:40]!r}: use 1 to 128 letters, digits, '.', '_' or '-'")
    return ItemId(text)
