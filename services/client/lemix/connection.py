"""A client's way to its cluster: the broker, and the tokenizer that the cluster publishes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lemix.discovery import Address
from lemix.tokenization import ModelCard, Tokenization, open_tokenization
from lemix_common.broker import Broker, connect
from lemix_common.errors import ClusterError
from lemix_common.settings import ClusterSettings


@dataclass(frozen=True, slots=True)
class Connection:
    """What a client works with."""

    broker: Broker
    tokenization: Tokenization
    client_expiry_s: float
    """For how long the cluster believes that a silent client lives."""


def open_connection(address: Address, *, patience_s: float) -> Connection:
    """Connect to a cluster's broker and read its tokenizer."""
    return connection_over(connect(address.url, address.cluster, patience_s=patience_s))


def connection_over(broker: Broker) -> Connection:
    """The same over a broker that is connected already; `ClusterError` if there is no cluster on it."""
    fields, settings = broker.hashes([broker.keys.model, broker.keys.settings])
    if not fields:
        raise ClusterError(f"no cluster {broker.keys.cluster!r} on this broker: start one with `lemix up`")
    tokenizer: Any = broker.again(lambda: broker.client.get(broker.keys.tokenizer))
    return Connection(
        broker,
        open_tokenization(ModelCard.parse(fields), str(tokenizer or "")),
        float(settings.get("client_expiry_s", ClusterSettings().client_expiry_s)),
    )
