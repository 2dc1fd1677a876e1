"""The real vLLM CPU engine on a tiny checkpoint, in this process, float32."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch

TOKENS = [5, 9, 20, 31, 44, 17, 8, 60, 3, 71, 12, 33, 50, 6, 24, 18, 40, 7, 29, 11, 62, 35]


def logprobs(folder: Path, tokens: list[int] = TOKENS, **options: Any) -> torch.Tensor:
    """float32 [len(tokens) - 1, V]: the whole distribution that each prompt token was predicted with."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(folder),
        **{
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 64,
            "max_num_batched_tokens": 64,
            "max_num_seqs": 1,
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
            "max_logprobs": -1,
        }
        | options,
    )
    try:
        sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, detokenize=False)
        (out,) = engine.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)
        rows = [torch.tensor([row[t].logprob for t in range(len(row))]) for row in out.prompt_logprobs[1:]]
        return torch.stack(rows)
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()
