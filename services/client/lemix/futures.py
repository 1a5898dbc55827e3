"""What a caller holds for an item it submitted."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import TypeVar

from lemix_common.errors import LemixError, WaitTimeout
from lemix_common.ids import ItemId

A = TypeVar("A")


class Future(concurrent.futures.Future[A]):
    """An answer to come.

    Like `concurrent.futures.Future`, but waiting in vain raises `WaitTimeout`, and `cancel` asks the cluster.
    """

    def __init__(self, item_id: ItemId, cancel_item: Callable[[ItemId], bool]) -> None:
        super().__init__()
        self.item_id = item_id
        self._cancel_item = cancel_item

    def result(self, timeout: float | None = None) -> A:
        """The answer; `ItemFailed` or `ItemCancelled` if there is none, `WaitTimeout` if it takes longer."""
        try:
            return super().result(timeout)
        except TimeoutError:
            if self.done():
                raise
            raise self._waited(timeout) from None

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Why there is no answer, or None."""
        try:
            return super().exception(timeout)
        except TimeoutError:
            raise self._waited(timeout) from None

    def cancel(self) -> bool:
        """Take the item back; False if it has ended or can't be taken back any more."""
        if self.done():
            return False
        try:
            return self._cancel_item(self.item_id)
        except LemixError:
            return False

    def _waited(self, timeout: float | None) -> WaitTimeout:
        return WaitTimeout(
            f"item {self.item_id} has not ended within {timeout:g} s; it goes on: wait longer, ask again with "
            f"result({str(self.item_id)!r}), or cancel it"
        )
