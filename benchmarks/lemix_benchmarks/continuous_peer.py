"""A peer of `decode`, as a process: transformers' continuous batching, in one thread.

    python -m lemix_benchmarks.continuous_peer FOLDER RUNNING DEVICE

Its cache has room for RUNNING requests, and no more: on a CPU it would take gigabytes and touch them first.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from threading import Thread
from typing import Any, Final

import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig

from lemix_benchmarks.decoding import NEW_TOKENS, PROMPT_TOKENS
from lemix_benchmarks.generate_peer import say
from lemix_benchmarks.model import read_bench_model

PAGE_TOKENS: Final = 32
LEAST_BLOCKS: Final = 16
BATCH_TOKENS: Final = 128
"""Of an iteration; with 256 it isn't faster."""
GPU_BATCH_TOKENS: Final = 512
_PAGE: Final[dict[str, Any]] = {
    "page_size"
    if "page_size" in {one.name for one in fields(ContinuousBatchingConfig)}
    else "block_size": PAGE_TOKENS
}
"""A page's tokens, by the name that their version has for it."""
_NO_TOKEN: Final = -1
_WAIT_S: Final = 1.0


@dataclass
class Running:
    """A request, and when its tokens were there."""

    number: int
    times: list[float] = field(default_factory=list)


def main() -> None:
    """Answer requests until the input ends."""
    torch.set_num_threads(1)
    model: Any = read_bench_model(Path(sys.argv[1]))
    device = sys.argv[3]
    model.to(device)
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False, eos_token_id=_NO_TOKEN, pad_token_id=0
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=num_blocks(int(sys.argv[2])),
            max_batch_tokens=BATCH_TOKENS if device == "cpu" else GPU_BATCH_TOKENS,
            **_PAGE,
        ),
    )
    manager.start()
    running: dict[str, Running] = {}
    Thread(target=submit_lines, args=(manager, running), daemon=True).start()
    say({"ready": f"transformers {transformers.__version__}"})
    while True:
        said = manager.get_result(timeout=_WAIT_S)
        if said is None:
            continue
        now, request = time.monotonic(), running[said.request_id]
        request.times += [now] * (len(said.generated_tokens) - len(request.times))
        if said.is_finished():
            del running[said.request_id]
            say(
                {
                    "number": request.number,
                    "tokens": list(said.generated_tokens),
                    "times": request.times,
                }
            )


def num_blocks(running: int) -> int:
    """Of a cache with room for so many of the longest requests."""
    longest = PROMPT_TOKENS[-1] + NEW_TOKENS[-1]
    return max(LEAST_BLOCKS, running * -(-longest // PAGE_TOKENS))


def submit_lines(manager: Any, running: dict[str, Running]) -> None:
    """Take requests in as they come."""
    for line in sys.stdin:
        for number, prompt, count in json.loads(line):
            request_id = f"{number}@{time.monotonic()}"  # a list's numbers come again in the next one
            running[request_id] = Running(number)
            manager.add_request(prompt, request_id=request_id, max_new_tokens=count, streaming=True)
    os._exit(0)


if __name__ == "__main__":
    main()
