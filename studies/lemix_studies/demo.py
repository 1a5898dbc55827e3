"""The demo: a cluster of its own, a minute of questions, and corrections that it learns meanwhile."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from lemix import Generation
from lemix.connection import Connection, open_connection
from lemix.discovery import DEFAULT_CLUSTER, Address
from lemix.running import running_cluster
from lemix_common.settings import ClusterSettings
from lemix_studies.curves import exact_matches
from lemix_studies.demo_plan import DemoArrival, DemoOptions, demo_arrivals, plan_demo
from lemix_studies.demo_watch import Watch
from lemix_studies.measures import before_and_after, count_lost
from lemix_studies.replay import PATIENCE_S, Outcome, run_replay
from lemix_studies.report import HISTORY, report_directory, summary_of, write_report
from lemix_studies.workload import WorkloadOptions

MODEL = Path(__file__).parent / "demo_model"
PREFIX = "demo"
COMMAND = "lemix demo"


def demo_settings(options: DemoOptions, policy: str) -> ClusterSettings:
    """Two pipelines of three stages, and a pace of learning that takes a fact in and leaves the others alone."""
    return ClusterSettings(
        model=str(MODEL),
        nodes=2,
        stages=3,
        policy=policy,
        step_examples=8,
        learning_rate=5e-4,
        weight_decay=0.0,
        seed=options.seed,
    )
