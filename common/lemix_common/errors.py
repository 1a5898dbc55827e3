"""Every error LeMix raises on purpose, in one tree, by whose fault it is.

::

    LemixError
    ├── BadInput                 the caller's: what, where, what to do
    │   ├── ModelError           a model folder or family that can't be used
    │   ├── OverLong             an item longer than the model's context
    │   ├── SettingsError        an unknown or impossible setting
    │   └── TokenizerMismatch    tokenized for another model
    ├── Refused                  the cluster's: the item was not accepted, try again
    │   ├── QueueFull            the queue's limit is reached (``retry_after_s``)
    │   └── ShuttingDown         the cluster takes no new items
    ├── ItemError                the item's: it was accepted and ended without an answer
    │   ├── ItemFailed           with its reason
    │   ├── ItemCancelled        by a client, or with it
    │   └── ItemUnknown          no such item, or its result has expired
    ├── WaitTimeout              the caller stopped waiting; the item goes on
    ├── BrokerError              the broker's
    │   ├── BrokerUnreachable
    │   └── BrokerUnsuitable     too old, read-only, not durable
    ├── PeerError                a peer's
    │   ├── PeerLost             the connection ended
    │   │   └── PeerUnreachable  there never was one: nobody answers at that address
    │   ├── PeerRefused          not authenticated, or not a neighbour
    │   └── BadFrame             unknown tag or version, wrong size, over a limit
    ├── Fenced                   ours: an older leader, epoch or attempt; drop the work
    └── ClusterError             a process or a stage of this cluster can't work, with its reason
        └── WeightsDamaged       a checkpoint or version on disk isn't what was sealed
"""

from __future__ import annotations


class LemixError(Exception):
    """Something LeMix can name; the message is one sentence a user can act on."""


class BadInput(LemixError, ValueError):
    """The caller gave something that can't work; nothing was changed."""


class ModelError(BadInput):
    """A model folder that is missing, damaged or of an unknown family, or a cut it doesn't allow."""


class OverLong(BadInput):
    """The item doesn't fit the model's context."""


class SettingsError(BadInput):
    """An unknown setting, or a value it can't take."""


class TokenizerMismatch(BadInput):
    """The item was tokenized with another tokenizer than the cluster's."""


class Refused(LemixError):
    """The item was not accepted and is in no queue."""


class QueueFull(Refused):
    """The cluster's queue is at its limit."""

    def __init__(self, depth: int, retry_after_s: float) -> None:
        super().__init__(f"the queue is full ({depth} items wait); try again in {retry_after_s:g} s")
        self.depth = depth
        self.retry_after_s = retry_after_s


class ShuttingDown(Refused):
    """The cluster is stopping: it takes no new items and serves no new weights, until it goes on."""


class ItemError(LemixError):
    """An accepted item that ended, or can only end, without an answer."""


class ItemFailed(ItemError):
    """The item ended as failed; the message is the reason the cluster recorded."""


class ItemCancelled(ItemError):
    """The item was cancelled, or ended with its client."""


class ItemUnknown(ItemError):
    """No such item, or its result has expired."""


class WaitTimeout(LemixError, TimeoutError):
    """The caller's time-out ended the wait; the item goes on and can be asked for again."""


class BrokerError(LemixError):
    """The broker can't be used."""


class BrokerUnreachable(BrokerError):
    """Nothing answers at the broker's address."""


class BrokerUnsuitable(BrokerError):
    """The broker answers but can't carry a cluster."""


class PeerError(LemixError):
    """A peer worker did something a healthy neighbour doesn't."""


class PeerLost(PeerError):
    """The connection to a peer ended or stalled."""


class PeerUnreachable(PeerLost):
    """Nobody listens at the address, or no way leads there; another address of the peer may do."""


class PeerRefused(PeerError):
    """The peer didn't prove that it belongs to this cluster."""


class BadFrame(PeerError):
    """A message that can't be read: unknown tag or version, wrong size, over a limit."""


class Fenced(LemixError):
    """An older leader, placement or attempt tried to change state; its work is dropped."""


class ClusterError(LemixError):
    """A process or stage of this cluster can't do its work."""


class WeightsDamaged(ClusterError):
    """A checkpoint or version on disk isn't what was sealed; nothing of it was used."""
