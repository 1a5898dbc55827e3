"""The operations worker's sign of life, from the loop in which Celery takes its messages."""

from __future__ import annotations

from typing import Any

from celery import Celery, bootsteps

from lemix_common.sign_of_life import SignOfLife

BEAT_S = 2.0


def show_life(app: Celery, sign_of_life: SignOfLife) -> None:
    """Show it as long as the worker is connected and its loop turns; while it looks for the broker it doesn't."""

    class Beat(bootsteps.StartStopStep):  # type: ignore[misc]
        requires = ("celery.worker.consumer.tasks:Tasks",)
        timer: Any = None

        def start(self, consumer: Any) -> None:
            sign_of_life.show()
            self.timer = consumer.timer.call_repeatedly(BEAT_S, sign_of_life.show)

        def stop(self, _consumer: Any) -> None:
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None

    app.steps["consumer"].add(Beat)
