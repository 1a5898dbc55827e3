"""``python -m lemix_stage_worker.profiling --model M --stages S --out FILE``: measure a model's stages on this machine.

A process with a worker's environment, as `lemix profile` starts it. What it found is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import structlog
import torch

from lemix_common.errors import BadInput, LemixError
from lemix_common.logs import configure_logs
from lemix_stage_worker.device import ENVIRONMENT, choose_device, prepare
from lemix_stage_worker.memory import keep_freed_memory
from lemix_stage_worker.model.source import dtype_named, open_model
from lemix_stage_worker.profiling.measuring import QUICK, Effort, measure_model

log = structlog.get_logger()


def main() -> None:
    """Read the options, measure, write what was found."""
    parser = argparse.ArgumentParser(prog="python -m lemix_stage_worker.profiling")
    parser.add_argument("--model", type=Path, required=True, help="a model's folder")
    parser.add_argument("--stages", type=int, required=True, help="how many the model is cut into")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or auto (default: cpu)")
    parser.add_argument("--dtype", default="", help="what is computed in (default: the model's)")
    parser.add_argument("--quick", action="store_true", help="fewer, shorter passes")
    parser.add_argument("--rounds", type=int, help="over all passes")
    parser.add_argument("--out", type=Path, help="a file for the JSON object (default: stdout)")
    options = parser.parse_args()
    configure_logs("profiling", level="info")
    os.environ.update(ENVIRONMENT)  # torch looks there when it first multiplies
    torch.set_num_threads(1)
    keep_freed_memory()
    effort = QUICK if options.quick else Effort()
    try:
        device = prepare(choose_device(options.device, "0"))
        source = open_model(options.model, dtype=dtype_named(options.dtype), device=device)
        if options.rounds:
            effort = replace(effort, rounds=options.rounds)
        text = json.dumps(measure_model(source, options.stages, effort), indent=1)
        if options.out is None:
            sys.stdout.write(f"{text}\n")
        else:
            options.out.write_text(f"{text}\n", "utf-8")
    except LemixError as error:
        log.error("profiling_ended", reason=str(error))
        sys.exit(2 if isinstance(error, BadInput) else 1)


if __name__ == "__main__":
    main()
