"""report.html: one file that needs nothing else, with the figures first, then the pictures, then everything."""

from __future__ import annotations

import html
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from string import Template
from typing import Any

from lemix_studies.wording import amount, duration, share

CAPTIONS = {
    "timeline.png": "What each stage did, in a stretch of the run: numbers are items, with a prime they are trained. "
    "<code>lemix timeline</code> draws any other stretch; <code>trace.json</code> has all of it, for Perfetto "
    "(ui.perfetto.dev).",
    "loss.png": "What training and serving made of the text, and which version of the weights answered.",
    "latency.png": "What requests waited for.",
}
_GROUPS: Mapping[str, Sequence[str]] = {
    "Items": "submitted done failed cancelled refused lost duplicated dead_lettered capped".split(),
    "Pace": "duration_s node_seconds items_per_second items_per_node_second goodput_per_second "
    "goodput_per_node_second".split(),
    "Serving": "response_s ttft_s itl_s slo_base_s slo_attainment training_tax prediction_error serving_loss "
    "exact_match exact_match_changed exact_match_unchanged".split(),
    "Training": "steps step_loss weights_versions weights_sha256".split(),
}
_SHARES = {
    "slo_attainment",
    "training_tax",
    "prediction_error",
    "exact_match",
    "exact_match_changed",
    "exact_match_unchanged",
}
_JOINTS = {"slo_attainment": " × idle ", "weights_sha256": ": "}
_MOST_NAMED = 6

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2.5rem auto; padding: 0 1.5rem }
  h1 { font-size: 1.6rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem }
  .subtitle, figcaption, .note { color: #666 }
  .tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .8rem; margin: 1.5rem 0 }
  .tile { border: 1px solid #ddd; border-radius: 6px; padding: .6rem 1rem }
  .tile b { display: block; font-size: 1.35rem; font-weight: 600; line-height: 1.3 } .tile span { color: #666 }
  figure { margin: 1.8rem 0 } figure img { max-width: 100%; height: auto } figcaption { font-size: .9rem }
  .groups { display: grid; grid-template-columns: repeat(auto-fit, minmax(30rem, 1fr)); gap: 0 2.5rem }
  table { border-collapse: collapse; width: 100% }
  th, td { text-align: left; vertical-align: top; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid #eee }
  th { font-weight: 400; color: #666; white-space: nowrap; width: 12.5rem } td { overflow-wrap: anywhere }
</style>
</head>
<body>
<h1>$title</h1>
<p class="subtitle">$subtitle</p>
<div class="tiles">
$tiles
</div>
$note$figures
<div class="groups">
$groups
</div>
</body>
</html>
""")


def report_page(
    summary: Mapping[str, Any],
    pictures: Mapping[str, bytes],
    *,
    title: str,
    subtitle: str = "",
    note: str = "",
) -> str:
    """The page; ``pictures`` are PNG files by name, ``note`` says what is missing."""
    return _PAGE.substitute(
        title=html.escape(title),
        subtitle=html.escape(subtitle),
        tiles="\n".join(_tile(value, name) for value, name in _headlines(summary)),
        note=f'<p class="note">{html.escape(note)}</p>\n' if note else "",
        figures="\n".join(_figure(name, picture) for name, picture in pictures.items()),
        groups="\n".join(_group(group, names, summary) for group, names in _grouped(summary)),
    )


def in_words(name: str, value: object) -> str:
    """A figure of the summary, by the unit in its name."""
    match value:
        case None:
            return "–"
        case Mapping():
            joint = _JOINTS.get(name, " ")
            return " · ".join(f"{key}{joint}{in_words(name, part)}" for key, part in value.items()) or "–"
        case list() | tuple():
            shown = [str(part) for part in value]
            if len(shown) > _MOST_NAMED:
                shown = [*shown[:2], "…", shown[-1], f"({len(value)})"]
            return " ".join(shown) or "–"
        case bool() | str():
            return str(value)
        case int() | float() if name in _SHARES:
            return share(value)
        case int() | float() if name.endswith(("_s", "node_seconds")):
            return duration(value)
        case int() | float():
            return amount(value)
    return str(value)


def _headlines(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The few figures that come first, those of them that there are."""
    yield f"{amount(summary['done'])} of {amount(summary['submitted'])}", "items done"
    yield in_words("items_per_second", summary["items_per_second"]), "items a second"
    for percent in ("p50", "p95"):
        if (response_s := summary["response_s"].get(percent)) is not None:
            yield duration(response_s), f"response, {percent}"
    yield share(summary["slo_attainment"]["5"]), "within 5 × idle"
    yield share(summary["training_tax"]), "training tax"
    yield amount(summary.get("steps", 0)), "steps trained"
    matched = summary.get("exact_match") or {}
    if matched.get("after"):
        yield f"{share(matched['before'])} → {share(matched['after'])}", "exact match"


def _tile(value: str, name: str) -> str:
    return f'<div class="tile"><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>'


def _figure(name: str, picture: bytes) -> str:
    source = f"data:image/png;base64,{b64encode(picture).decode()}"
    return (
        f'<figure><img alt="{name}" src="{source}"><figcaption>{CAPTIONS.get(name, "")}</figcaption></figure>'
    )


def _grouped(summary: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """The groups with those of their names that there are; last what belongs to none."""
    named = {name for names in _GROUPS.values() for name in names}
    for group, names in {**_GROUPS, "Run": [name for name in summary if name not in named]}.items():
        if present := [name for name in names if name in summary]:
            yield group, present


def _group(group: str, names: Iterable[str], summary: Mapping[str, Any]) -> str:
    rows = "\n".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(in_words(name, summary[name]))}</td></tr>"
        for name in names
    )
    return f"<section><h2>{group}</h2>\n<table>\n{rows}\n</table></section>"
