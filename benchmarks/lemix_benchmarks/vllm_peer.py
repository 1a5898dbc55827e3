"""A peer of `decode`, as a process: vLLM on CPU as a pipeline of two stages, run by its own environment's Python.

    PYTHON -I vllm_peer.py FOLDER

Nothing of ours is imported here, nor anything but vLLM. Each stage computes in one thread, on a core of its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from queue import SimpleQueue
from threading import Thread
from typing import Any

SETTINGS = {
    "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "20",
}
MAX_RUNNING = 64
LONGEST = 512
END_TIMEOUT_S = 30.0
"""With less, here and for its workers, a busy machine has it kill them, and their shared memory is left behind."""


def main() -> None:
    """Answer requests until the input ends."""
    say = answers_apart()
    os.environ.update(SETTINGS)

    import vllm  # type: ignore[import-not-found] # not above: it reads the environment when it is imported

    engine = vllm.LLMEngine.from_engine_args(
        vllm.EngineArgs(
            model=sys.argv[1],
            dtype="float32",
            pipeline_parallel_size=2,
            enforce_eager=False,
            skip_tokenizer_init=True,
            max_model_len=LONGEST,
            max_num_seqs=MAX_RUNNING,
            disable_log_stats=True,
        )
    )
    say({"ready": f"vllm {vllm.__version__}"})
    lines: SimpleQueue[list[Any] | None] = SimpleQueue()
    Thread(target=read_lines, args=(lines,), daemon=True).start()
    answer(engine, vllm, lines, say)
    engine.engine_core.shutdown(timeout=END_TIMEOUT_S)
    os._exit(0)


def answer(engine: Any, vllm: Any, lines: Any, say: Any) -> None:
    """Take requests in as they come, between iterations."""
    running: dict[str, tuple[int, list[int], list[float]]] = {}
    num_taken = 0
    while True:
        while not running or not lines.empty():
            requests = lines.get()
            if requests is None:
                return
            for number, prompt, count in requests:
                num_taken += 1
                running[str(num_taken)] = number, [], []
                sampling = vllm.SamplingParams(
                    temperature=0.0,
                    max_tokens=count,
                    ignore_eos=True,
                    detokenize=False,
                    output_kind=vllm.sampling_params.RequestOutputKind.DELTA,
                )
                engine.add_request(str(num_taken), {"prompt_token_ids": prompt}, sampling)
        for output in engine.step():
            number, tokens, times = running[output.request_id]
            news = list(output.outputs[0].token_ids)
            tokens += news
            times += [time.monotonic()] * len(news)
            if output.finished:
                del running[output.request_id]
                say({"number": number, "tokens": tokens, "times": times})


def answers_apart() -> Any:
    """A function that writes a line to what was the standard output, which from now on vLLM's own words don't reach."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return lambda message: print(json.dumps(message), file=answers)


def read_lines(lines: Any) -> None:
    """Requests as they come, then None."""
    for line in sys.stdin:
        lines.put(json.loads(line))
    lines.put(None)


if __name__ == "__main__":
    main()
