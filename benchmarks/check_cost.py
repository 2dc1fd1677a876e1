#!/usr/bin/env python3
"""What ``VLLM_GEMMA4_SPEC_CHECK=1`` costs: seconds of the same work with and without, side by side.

    python benchmarks/check_cost.py [--rounds 5]

A tiny Gemma 4 as its own drafter (CPU, float32, k = 3, 8 requests): its passes are so short that the check weighs
far more than with a model of real size. Both engines live in this process and take turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support import tiny_models
from tests.support.engine import engine, generate, random_prompts
from vllm_gemma4_spec import settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    model = tiny_models.save(tiny_models.target_config(), Path(tempfile.mkdtemp(prefix="check-cost-")) / "model")
    prompts = random_prompts([100] * 8)
    seconds: dict[str, list[float]] = {"0": [], "1": []}
    with ExitStack() as stack:
        engines: dict[str, Any] = {}
        for check in seconds:
            os.environ[settings.CHECK.name] = check
            engines[check] = stack.enter_context(engine(model, model, 3))
            generate(engines[check], prompts, 16)  # warm
        for _ in range(rounds):
            for check, llm in engines.items():
                started = time.process_time()  # other processes on the machine do not count
                generate(llm, prompts, 96)
                seconds[check].append(time.process_time() - started)
    ratio = statistics.median(on / off for off, on in zip(seconds["0"], seconds["1"], strict=True))
    for check, values in seconds.items():
        print(f"CHECK={check}: median {statistics.median(values):.3f} s; {[round(v, 3) for v in values]}")
    print(f"median ratio, run for run: {ratio:.2f}")


if __name__ == "__main__":
    main()
