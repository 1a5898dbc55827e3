"""The Celery app of the operations workers, and the coordinator's way to it."""

from __future__ import annotations

from dataclasses import dataclass

import structlog
from celery import Celery
from kombu.exceptions import OperationalError

log = structlog.get_logger()

ADVANCE = "lemix.advance"
REMOVE = "lemix.remove"
TRANSITION_S = 20
"""The longest a transition may take; a task not acknowledged for longer is delivered again."""


def make_app(url: str, cluster: str) -> Celery:
    """The app, on the cluster's own broker under the cluster's own prefix. Nothing is ever waited for."""
    app = Celery(f"lemix-{cluster}", broker=url, set_as_current=False)
    app.conf.update(
        broker_transport_options={
            "global_keyprefix": f"{{{cluster}}}:celery:",
            "visibility_timeout": TRANSITION_S + 10,
            "unacked_restore_interval": 5,
            "unacked_restore_throttle": 1,
            "socket_keepalive": True,
        },
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_connection_timeout=2,
        worker_cancel_long_running_tasks_on_connection_loss=True,
        task_ignore_result=True,
        task_acks_late=True,
        task_default_queue="operations",
        task_serializer="json",
        accept_content=["json"],
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        worker_send_task_events=False,
        task_store_errors_even_if_ignored=False,
    )
    return app


@dataclass(frozen=True, slots=True)
class CeleryTransitions:
    """`Transitions` by Celery messages; one that can't be sent now is sent by the reconciler's next try."""

    app: Celery

    def advance(self, operation: str) -> None:
        """Enqueue an operation's next transition."""
        self._send(ADVANCE, operation)

    def remove(self, version: str, directory: str) -> None:
        """Enqueue the removal of a retired version's files."""
        if directory:
            self._send(REMOVE, version, directory)

    def _send(self, name: str, *args: str) -> None:
        try:
            self.app.send_task(name, args=args, retry=False, ignore_result=True)
        except (OperationalError, OSError) as error:
            log.warning("transition_not_sent", task=name, args=args, reason=str(error))
