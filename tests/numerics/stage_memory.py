"""Load one stage of a model folder and print what it cost: run in a process of its own.

`python stage_memory.py FOLDER STAGE STAGES` prints `{"peak_bytes", "weight_bytes"}`: the peak of resident memory
after loading, less the resident memory after the imports.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lemix_stage_worker.model.costs import cut_model
from lemix_stage_worker.model.source import open_model
from lemix_stage_worker.model.stage import StageCut, build_stage


def _memory_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    folder, index, stages = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    before = _memory_bytes("VmRSS")
    source = open_model(folder)
    stage = build_stage(source, StageCut(index, stages, cut_model(source, stages)[index]))
    stage.load(source.read(stage.parameter_names()))
    print(json.dumps({"peak_bytes": _memory_bytes("VmHWM") - before, "weight_bytes": stage.weight_bytes}))
