"""A peer of `decode`, as a process: transformers' `generate`, one batch after another, in one thread.

    python -m lemix_benchmarks.generate_peer FOLDER DEVICE

A batch's prompts are padded on the left, as it needs; its rows all go on as long as the longest, as it does.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from lemix_benchmarks.model import read_bench_model

_PADDING = 0


class Times(BaseStreamer):
    """When each of a batch's tokens was there; it is told the prompt first."""

    def __init__(self) -> None:
        self.told: list[float] = []

    def put(self, value: Tensor) -> None:  # noqa: ARG002 - theirs
        """Note the time."""
        self.told.append(time.monotonic())

    def end(self) -> None:
        """Nothing is left to be shown."""


def main() -> None:
    """Answer batches until the input ends."""
    torch.set_num_threads(1)
    model: Any = read_bench_model(Path(sys.argv[1]))
    model.to(sys.argv[2])
    say({"ready": f"transformers {transformers.__version__}"})
    for line in sys.stdin:
        batch = json.loads(line)
        tokens_BN, times = generate(model, [ids for _, ids, _ in batch], max(count for *_, count in batch))
        for (number, _, count), tokens in zip(batch, tokens_BN, strict=True):
            say({"number": number, "tokens": tokens[:count], "times": times[:count]})


def generate(model: Any, prompts: Sequence[Sequence[int]], count: int) -> tuple[list[list[int]], list[float]]:
    """So many tokens after each prompt, and when they were there."""
    longest = max(map(len, prompts))
    ids_BT = torch.tensor(
        [[_PADDING] * (longest - len(ids)) + list(ids) for ids in prompts], device=model.device
    )
    mask_BT = torch.tensor(
        [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device
    )
    times = Times()
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, max_new_tokens=count, eos_token_id=None, pad_token_id=_PADDING
    )
    answer_BN = model.generate(ids_BT, attention_mask=mask_BT, generation_config=config, streamer=times)
    return answer_BN[:, longest:].tolist(), times.told[1:]


def say(message: dict[str, object]) -> None:
    """A line of its own, at once."""
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
