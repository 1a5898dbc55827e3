"""How two workers show each other that they belong to one cluster, before any frame.

::

    connector                               listener
        ── Hello(worker, nonce) ───────────────▶
        ◀─ Challenge(worker, nonce, proof) ─────
        ── Answer(proof) ──────────────────────▶
        ◀─ Welcome() ───────────────────────────

A proof is the HMAC-SHA256, under the cluster's secret, of who proves it, both worker ids and both nonces: it
fits this conversation and this direction only. The secret itself never travels, and the limits of this
vocabulary are small: who hasn't proved anything can't make a worker hold memory.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from secrets import token_hex
from typing import Final, TypeVar

from lemix_common.errors import PeerRefused
from lemix_common.ids import WorkerId
from lemix_common.transports.base import Identity
from lemix_common.wire import Codec, FrameLayout, Limits


@dataclass(frozen=True, slots=True)
class Hello:
    """The connecting worker names itself."""

    worker: str
    nonce: str


@dataclass(frozen=True, slots=True)
class Challenge:
    """The listening worker names itself and proves its secret first."""

    worker: str
    nonce: str
    proof: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The connecting worker's proof."""

    proof: str


@dataclass(frozen=True, slots=True)
class Welcome:
    """Frames may follow."""


Greeting = Hello | Challenge | Answer | Welcome

GREETINGS: Final[FrameLayout[Greeting]] = FrameLayout(
    Codec(Greeting), Limits(header_bytes=1_024, payload_bytes=0, num_tensors=0)
)

Say = Callable[[Greeting], None]
Hear = Callable[[], Greeting]
G = TypeVar("G", bound=Greeting)


def greet_listener(identity: Identity, say: Say, hear: Hear) -> WorkerId:
    """The connector's side; the listener's worker id."""
    hello = Hello(identity.worker, token_hex())
    say(hello)
    challenge = _expect(Challenge, hear())
    _check(challenge.proof, _proof("listener", identity.secret, hello, challenge), challenge.worker)
    say(Answer(_proof("connector", identity.secret, hello, challenge)))
    _expect(Welcome, hear())
    return WorkerId(challenge.worker)


def greet_connector(identity: Identity, say: Say, hear: Hear) -> WorkerId:
    """The listener's side; the connector's worker id."""
    hello = _expect(Hello, hear())
    unproved = Challenge(identity.worker, token_hex(), "")
    challenge = replace(unproved, proof=_proof("listener", identity.secret, hello, unproved))
    say(challenge)
    answer = _expect(Answer, hear())
    _check(answer.proof, _proof("connector", identity.secret, hello, challenge), hello.worker)
    say(Welcome())
    return WorkerId(hello.worker)


def _expect(kind: type[G], greeting: Greeting) -> G:
    if not isinstance(greeting, kind):
        raise PeerRefused(f"the peer said {type(greeting).__name__} where {kind.__name__} is due")
    return greeting


def _proof(prover: str, secret: bytes, hello: Hello, challenge: Challenge) -> str:
    said = json.dumps([prover, hello.worker, hello.nonce, challenge.worker, challenge.nonce])
    return hmac.digest(secret, said.encode(), "sha256").hex()


def _check(proof: str, right: str, worker: str) -> None:
    if not hmac.compare_digest(proof.encode(), right.encode()):
        raise PeerRefused(f"worker {worker!r:.80} doesn't hold this cluster's secret")
