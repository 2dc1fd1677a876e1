"""What grammars by position cost: processor time of the same work with the patches and without, in one engine.

    python benchmarks/request_cost.py [--rounds 9]

A tiny Gemma 4 as its own drafter (CPU, float32, k = 3, 8 requests), with and without a constraint; the patches go off
and on between blocks. Its steps are so short that what is done for a request weighs far more than with a real model.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.requests.generator import SCHEMA
from tests.requests.test_random_requests import OPTIONS
from tests.support import scripted
from tests.support.engine import engine
from vllm_gemma4_spec.registry import PATCHER
from vllm_gemma4_spec.requests.patches import PATCHES

CASES: dict[str, dict[str, Any]] = {
    "unconstrained": {},
    "JSON schema": {"json": {"type": "array", "items": SCHEMA, "minItems": 9}},
    "regex": {"regex": "([a-z]{1,9} ){40,60}"},
}


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--rounds", type=int, default=9)
    rounds = ap.parse_args().rounds

    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    target = scripted.save(Path(tempfile.mkdtemp(prefix="request-cost-")) / "target")
    closed = scripted.tokenizer().encode("<bos><|turn>user\nWhat?<turn|>\n<|turn>model\n<|channel>thought\n<channel|>")

    def work(llm: Any, constraint: dict[str, Any]) -> float:
        values: dict[str, Any] = {"temperature": 0.0, "max_tokens": 96, "ignore_eos": not constraint}
        params = [
            SamplingParams(**values, structured_outputs=StructuredOutputsParams(**constraint) if constraint else None)
            for _ in range(8)
        ]
        started = time.process_time()  # other processes on the machine do not count
        outputs = llm.generate([{"prompt_token_ids": closed}] * 8, params, use_tqdm=False)
        return (time.process_time() - started) / sum(len(o.outputs[0].token_ids) for o in outputs)

    with engine(target, target, 3, **OPTIONS) as llm:
        for name, constraint in CASES.items():
            seconds: dict[str, list[float]] = {"stock": [], "patched": []}
            turns: list[tuple[str, Callable[..., None]]] = [("stock", PATCHER.undo), ("patched", PATCHER.apply)]
            work(llm, constraint)  # warm
            for _ in range(rounds):
                for which, switch in turns:
                    switch(PATCHES)
                    seconds[which].append(work(llm, constraint))
            ratio = statistics.median(p / s for s, p in zip(seconds["stock"], seconds["patched"], strict=True))
            medians = {which: round(1e6 * statistics.median(values), 1) for which, values in seconds.items()}
            print(f"{name:14s} µs a token: {medians}; median ratio, run for run: {ratio:.3f}", flush=True)


if __name__ == "__main__":
    main()
