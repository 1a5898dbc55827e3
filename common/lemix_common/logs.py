"""Structured logs: one event a line, JSON unless on a terminal; set up once by each process's composition root."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, TextIO

import structlog

_PASSWORD = re.compile(r"(\w+://[^:/@\s]*:)[^@\s]+@")


def hide_passwords(_logger: object, _name: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    """A broker's URL may carry a password; no log line does."""
    for key, value in event.items():
        if isinstance(value, str) and "://" in value:
            event[key] = _PASSWORD.sub(r"\1***@", value)
        elif isinstance(value, str) and key in {"secret", "password"}:
            event[key] = "***"
    return event


def naming(process: str) -> Callable[[object, str, MutableMapping[str, Any]], Mapping[str, Any]]:
    """A processor that adds the process's name: a bound context would be that of one thread."""

    def name(_logger: object, _name: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
        event["process"] = process
        return event

    return name


def configure_logs(process: str, *, level: str = "info", stream: TextIO | None = None) -> None:
    """Set up logging for this process; every line names it."""
    out = stream or sys.stderr
    renderer: Any = structlog.dev.ConsoleRenderer() if out.isatty() else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            naming(process),
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            hide_passwords,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(out),
        cache_logger_on_first_use=False,
    )
