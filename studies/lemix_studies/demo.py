"""The demo: a cluster of its own, a minute of questions, and corrections that it learns meanwhile."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from rich.console import Console

from lemix import Generation
from lemix.connection import open_connection
from lemix.discovery import DEFAULT_CLUSTER, Address
from lemix.running import running_cluster
from lemix_common.errors import ClusterError
from lemix_common.settings import ClusterSettings
from lemix_studies.curves import exact_matches
from lemix_studies.demo_plan import DemoArrival, DemoOptions, demo_arrivals, plan_demo
from lemix_studies.demo_watch import Watch
from lemix_studies.measures import before_and_after, count_lost
from lemix_studies.replay import PATIENCE_S, Outcome, run_replay
from lemix_studies.report import HISTORY, summary_of
from lemix_studies.workload import WorkloadOptions

MODEL = Path(__file__).parent / "demo_model"
_PREFIX = "demo"


def demo_settings(options: DemoOptions, policy: str) -> ClusterSettings:
    """Two pipelines of three stages, and a pace of learning that takes a fact in and leaves the others alone."""
    return ClusterSettings(
        model=str(MODEL),
        nodes=2,
        stages=3,
        policy=policy,
        step_examples=8,
        learning_rate=4e-4,
        weight_decay=0.0,
        seed=options.seed,
    )


def run_demo(settings: ClusterSettings, options: DemoOptions, directory: Path, console: Console) -> Outcome:
    """Start a cluster, ask and teach it, and stop it; the history is written meanwhile."""
    with ExitStack() as until_end:
        data_dir = until_end.enter_context(_data_directory())
        with console.status(f"Starting a broker, a coordinator and {settings.num_workers} stage workers …"):
            url = until_end.enter_context(running_cluster(settings, data_dir=data_dir))
        connection = open_connection(Address(url, DEFAULT_CLUSTER, data_dir), patience_s=PATIENCE_S)
        until_end.enter_context(closing(connection.broker.client))
        arrivals = demo_arrivals(plan_demo(options), connection.tokenization)
        watch = Watch(
            console,
            {str(arrival.item(_PREFIX).item_id): arrival for arrival in arrivals},
            connection.tokenization.decode,
            connection.broker.clock.now,
        )
        history = until_end.enter_context((directory / HISTORY).open("w", encoding="utf-8"))
        until_end.enter_context(watch.shown())
        return run_replay(
            connection, arrivals, history, prefix=_PREFIX, data_dir=data_dir, on_reply=watch.hear
        )


@contextmanager
def _data_directory() -> Iterator[Path]:
    """A directory for the length of a ``with`` block; a cluster that failed leaves it, since its error names a log."""
    path = Path(tempfile.mkdtemp(prefix="lemix-demo-"))
    try:
        yield path
    except ClusterError:
        raise
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
    shutil.rmtree(path, ignore_errors=True)


def demo_summary(outcome: Outcome, options: DemoOptions, directory: Path) -> dict[str, object]:
    """The object of `lemix demo --json`: a replay's, and the exact match of facts that changed and of others."""
    changed, unchanged = (_matches(outcome, has_changed=has_changed) for has_changed in (True, False))
    lengths = {
        item: len(answer.tokens)
        for item, answer in outcome.answers.items()
        if isinstance(answer, Generation)  # which ends where the model ends it
    }
    return summary_of(outcome, WorkloadOptions(seed=options.seed), directory) | {
        "lost": count_lost(outcome.items, lengths),
        "exact_match_changed": before_and_after(changed),
        "exact_match_unchanged": before_and_after(unchanged),
        "answers": {"changed": len(changed), "unchanged": len(unchanged)},
        "policy": outcome.policy,
    }


def _matches(outcome: Outcome, *, has_changed: bool) -> list[float]:
    """Of the generations about facts that changed, or didn't: 1.0 for each right answer."""
    return [
        match
        for item, match in exact_matches(outcome).items()
        for arrival in [outcome.arrivals[item]]
        if isinstance(arrival, DemoArrival) and arrival.exchange.has_changed == has_changed
    ]
