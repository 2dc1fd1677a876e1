"""Two ranks in vLLM's Ray executor: ``python -m tests.engine.ray_engine TARGET DRAFTER RESULT``.

``tests/support/ray_on_cpu`` must be first on PYTHONPATH. Prints the executor, the answers and the counters as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from tests.support.engine import acceptance, engine, generate, random_prompts

PROMPTS = random_prompts([5, 40, 90, 17])
TOKENS = 24


def main(target: Path, drafter: Path, result: Path) -> None:
    import ray

    ray.init(num_gpus=2, num_cpus=2, include_dashboard=False, object_store_memory=200 << 20)
    with engine(target, drafter, tensor_parallel_size=2, distributed_executor_backend="ray") as llm:
        before = acceptance(llm)
        answers = generate(llm, PROMPTS, TOKENS)
        counts = dataclasses.asdict(acceptance(llm) - before)
        executor = type(llm.llm_engine.model_executor).__name__
    result.write_text(json.dumps({"executor": executor, "answers": answers, "counts": counts}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
