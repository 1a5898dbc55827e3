"""A stream of bytes between two workers that only the broker leads to, over Redis' Pub/Sub.

Each end subscribes to a mailbox of its own and publishes to its peer's. Nothing is stored: no key, no line in the
broker's durable log, nothing to expire or to clean up, and a publication tells at once whether anybody still listens.
A message is a letter that says its kind, a number, and what it carries::

    C  call     to a listener's door: whose mailbox           O  opened   the answer: the listener's mailbox for it
    D  bytes    number: how many were sent before             T  taken    number: how many the receiver has used
    E  end      nothing more comes, nothing more is taken     P  ping     is anybody there?

At most `WINDOW_BYTES` are on their way, which is less than what makes a broker drop a slow subscriber. A broker that
drops messages nevertheless, or goes away, ends the connection: the count of bytes shows a gap.
"""

from __future__ import annotations

import re
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from secrets import token_hex
from threading import Condition, Thread
from typing import Any, Final

import redis
from redis.exceptions import RedisError

from lemix_common.keys import Keys

WINDOW_BYTES: Final = 2**22
CHUNK_BYTES: Final = 2**19
PING_S: Final = 0.5
"""A peer that was killed is missed after about so long."""
_HEAD: Final = struct.Struct("<cQ")
_CALL, _OPENED, _BYTES, _TAKEN, _END, _PING = b"C", b"O", b"D", b"T", b"E", b"P"
_MAILBOX: Final = re.compile(rb"[A-Za-z0-9._-]{1,128}:[0-9a-f]{32}")
_CONFIRM_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Post:
    """Mailboxes on a cluster's broker."""

    client: redis.Redis
    """Of bytes, not of text; nobody else's."""
    keys: Keys

    def close(self) -> None:
        """Close its connections to the broker."""
        self.client.connection_pool.disconnect()

    def publish(self, mailbox: str, kind: bytes, number: int = 0, *content: bytes | memoryview) -> bool:
        """Whether somebody got it; `OSError` if the broker is away."""
        message = b"".join((_HEAD.pack(kind, number), *content))
        try:
            return bool(self.client.publish(self.keys.tensors(mailbox), message))
        except RedisError as error:
            raise ConnectionError(f"the broker: {error}") from error

    def is_taken(self, mailbox: str) -> bool:
        """Whether somebody listens there."""
        try:
            ((_, listeners),) = self.client.pubsub_numsub(self.keys.tensors(mailbox))
        except RedisError as error:
            raise ConnectionError(f"the broker: {error}") from error
        return bool(listeners)

    def subscribe(self, mailbox: str) -> Subscription:
        """Listen there from now on."""
        subscription = Subscription(self.client.pubsub())  # type: ignore[no-untyped-call]
        try:
            subscription.begin(self.keys.tensors(mailbox))
        except OSError:
            subscription.close()
            raise
        return subscription


@dataclass(frozen=True, slots=True)
class Subscription:
    """One mailbox, read by one thread at a time."""

    pubsub: Any

    def begin(self, channel: str) -> None:
        """Return when the broker has confirmed it."""
        try:
            self.pubsub.subscribe(channel)
            self._confirm("subscribe")
        except RedisError as error:
            raise ConnectionError(f"the broker: {error}") from error

    def next(self, *, timeout_s: float) -> tuple[bytes, int, memoryview] | None:
        """The next message's kind, number and content; none if none came in time."""
        try:
            message = self.pubsub.get_message(timeout=timeout_s)
        except (RedisError, ValueError) as error:
            raise ConnectionError(f"the broker: {error}") from error
        if message is None or message["type"] != "message" or len(message["data"]) < _HEAD.size:
            return None
        kind, number = _HEAD.unpack_from(message["data"])
        return kind, number, memoryview(message["data"])[_HEAD.size :]

    def close(self) -> None:
        """Stop listening; when this returns, the broker knows."""
        with suppress(RedisError, OSError, ValueError):
            if self.pubsub.subscribed:
                self.pubsub.unsubscribe()
                self._confirm("unsubscribe")
        self.pubsub.close()

    def _confirm(self, kind: str) -> None:
        while (message := self.pubsub.get_message(timeout=_CONFIRM_S)) is not None:
            if message["type"] == kind:
                return
        raise ConnectionError(f"the broker didn't answer {kind} in {_CONFIRM_S:g} s")


class BrokerConnection:
    """A connection through the broker, with a socket's calls and errors."""

    def __init__(self, post: Post, name: str, *, send_timeout_s: float, caller: str = "") -> None:
        self._post = post
        self._mailbox = f"{name}:{token_hex(16)}"
        self._peer = caller
        self._send_timeout_s = send_timeout_s
        self._timeout_s: float | None = None
        self._pump: Thread | None = None
        self._changed = Condition()
        self._is_ended = False
        self._arrived: deque[memoryview] = deque()
        self._num_arrived = self._num_used = self._num_confirmed = 0
        self._num_sent = self._num_taken = 0

    def call(self, door: str, *, timeout_s: float) -> None:
        """Connect to who listens there; `ConnectionRefusedError` if nobody does."""
        self._start()
        if not self._post.publish(door, _CALL, 0, self._mailbox.encode()):
            raise ConnectionRefusedError("nobody listens there")
        with self._changed:
            if not self._changed.wait_for(lambda: self._peer or self._is_ended, timeout_s):
                raise TimeoutError("it doesn't answer")
            if not self._peer:
                raise ConnectionResetError("the broker went away")

    def answer(self) -> None:
        """Connect to who called."""
        self._start()
        self._publish(_OPENED, 0, self._mailbox.encode())

    def settimeout(self, seconds: float | None, /) -> None:
        """How long to wait for bytes."""
        self._timeout_s = seconds

    def sendmsg(self, pieces: Sequence[memoryview], /) -> int:
        """Publish the next bytes, as many as the window has room for."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._is_ended or self._room, self._send_timeout_s):
                raise BlockingIOError("the peer takes nothing")
            if self._is_ended:
                raise BrokenPipeError("the peer ended the connection")
            parts, num_bytes = _first(pieces, min(self._room, CHUNK_BYTES))
            begin = self._num_sent
            self._num_sent += num_bytes
        self._publish(_BYTES, begin, *parts)
        return num_bytes

    def recv_into(self, view: memoryview, num_bytes: int, flags: int, /) -> int:
        """Wait for bytes."""
        wanted = num_bytes if flags & socket.MSG_WAITALL else 1
        received = 0
        while received < wanted:
            piece = self._next_piece(num_bytes - received)
            if not piece:
                break
            view[received : received + len(piece)] = piece
            received += len(piece)
        return received

    def recv(self, num_bytes: int, /) -> bytes:
        """Wait for few bytes."""
        return bytes(self._next_piece(num_bytes))

    def shutdown(self, how: int, /) -> None:
        """End it, tell the peer, and wake who waits."""
        assert how == socket.SHUT_RDWR
        if self._end():
            self._post.publish(self._mailbox, _PING)  # wakes the pump, which says the rest

    def close(self) -> None:
        """End it and wait for its thread."""
        with suppress(OSError):
            self.shutdown(socket.SHUT_RDWR)
            if self._pump is None and self._peer:
                self._post.publish(self._peer, _END)  # who called isn't answered
        if self._pump is not None:
            self._pump.join()
        self._post.close()

    @property
    def _room(self) -> int:
        return WINDOW_BYTES - (self._num_sent - self._num_taken)

    def _start(self) -> None:
        subscription = self._post.subscribe(self._mailbox)
        name = f"tensors {self._mailbox}"
        self._pump = Thread(target=self._take_messages, args=(subscription,), name=name, daemon=True)
        self._pump.start()

    def _publish(self, kind: bytes, number: int, *content: bytes | memoryview) -> None:
        if not self._post.publish(self._peer, kind, number, *content):
            self._end()
            raise ConnectionResetError("the peer is gone")

    def _end(self) -> bool:
        """Take and give nothing more; False if that was so already."""
        with self._changed:
            was_ended, self._is_ended = self._is_ended, True
            self._changed.notify_all()
        return not was_ended

    def _next_piece(self, num_bytes: int) -> memoryview:
        with self._changed:
            if not self._changed.wait_for(lambda: self._arrived or self._is_ended, self._timeout_s):
                raise TimeoutError("the peer says nothing")
            if not self._arrived:
                return memoryview(b"")
            piece = self._arrived.popleft()
            if len(piece) > num_bytes:
                self._arrived.appendleft(piece[num_bytes:])
            self._num_used += len(piece[:num_bytes])
            is_due = self._num_used - self._num_confirmed >= WINDOW_BYTES // 4 and not self._is_ended
            if is_due:
                self._num_confirmed = self._num_used
        if is_due:
            self._publish(_TAKEN, self._num_used)
        return piece[:num_bytes]

    # ---- the pump
    def _take_messages(self, subscription: Subscription) -> None:
        with suppress(OSError):
            while not self._is_ended:
                message = subscription.next(timeout_s=PING_S)
                if message is not None:
                    self._take(*message)
                elif self._peer:
                    self._publish(_PING, 0)
        self._end()
        with suppress(OSError):
            if self._peer:
                self._post.publish(self._peer, _END)
        subscription.close()

    def _take(self, kind: bytes, number: int, content: memoryview) -> None:
        with self._changed:
            if kind == _BYTES:
                self._take_bytes(number, content)
            elif kind == _TAKEN:
                self._num_taken = min(max(number, self._num_taken), self._num_sent)
            elif kind == _OPENED and not self._peer and _MAILBOX.fullmatch(content):
                self._peer = bytes(content).decode()
            elif kind == _END:
                self._is_ended = True
            self._changed.notify_all()

    def _take_bytes(self, number: int, content: memoryview) -> None:
        waiting = self._num_arrived - self._num_used + len(content)
        if number != self._num_arrived or waiting > 2 * WINDOW_BYTES:
            self._is_ended = True  # some were lost, or the peer keeps to no window
            return
        self._num_arrived += len(content)
        self._arrived.append(content)


class Door:
    """A mailbox that is called, with a listening socket's calls and errors."""

    def __init__(self, post: Post, name: str, *, connect: Callable[[str], BrokerConnection]) -> None:
        self._post = post
        self._name = name
        self._connect = connect
        self._subscription: Subscription | None = None
        self._is_closed = False

    def open(self) -> None:
        """Take the name; `OSError` if somebody has it."""
        if self._post.is_taken(self._name):
            raise OSError("it is taken")
        self._subscription = self._post.subscribe(self._name)

    def accept(self) -> tuple[BrokerConnection, None]:
        """Wait for the next call; when the broker was away, the door is opened again."""
        while not self._is_closed:
            try:
                if self._subscription is None:
                    self._subscription = self._post.subscribe(self._name)
                message = self._subscription.next(timeout_s=PING_S)
            except OSError:
                self._shut()
                raise
            if message is not None and message[0] == _CALL and _MAILBOX.fullmatch(message[2]):
                return self._connect(bytes(message[2]).decode()), None
        raise OSError("the door is closed")

    def shutdown(self, how: int, /) -> None:
        """Wake who waits for a call."""
        assert how == socket.SHUT_RDWR
        self._is_closed = True
        self._post.publish(self._name, _PING)

    def close(self) -> None:
        """Give the name back."""
        self._shut()
        self._post.close()

    def _shut(self) -> None:
        if self._subscription is not None:
            self._subscription.close()
            self._subscription = None


def _first(pieces: Sequence[memoryview], num_bytes: int) -> tuple[list[memoryview], int]:
    """The pieces' first bytes, at most so many, and how many those are."""
    parts: list[memoryview] = []
    left = num_bytes
    for piece in pieces:
        parts.append(piece[:left])
        left -= len(parts[-1])
        if not left:
            break
    return parts, num_bytes - left
