"""Speculation without a draft model, with every patch on: ngram with a Gemma 4 target, MTP with the smallest model
that vLLM has a multi-token predictor for (Ernie 4.5; Gemma 4 has none)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support.engine import acceptance, engine, generate, random_prompts

pytestmark = pytest.mark.slow  # numba and the experts are compiled


def test_ngram(tiny: dict[str, Path]) -> None:
    """Prompts that repeat themselves, so that there is something to look up."""
    prompts = [p * 4 for p in random_prompts((5, 17, 30))]
    with engine(tiny["target"]) as llm:
        want = generate(llm, prompts, 40)
    speculative = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with engine(tiny["target"], speculative_config=speculative) as llm:
        before = acceptance(llm)
        assert generate(llm, prompts, 40) == want
        counts = acceptance(llm) - before
    assert 0 < counts.accepted < counts.proposed


@pytest.fixture(scope="module")
def ernie(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, the second with four experts, and one layer that predicts a further token; float32."""
    folder = tmp_path_factory.mktemp("ernie")
    hidden, middle, heads, size = 64, 96, 2, 32
    config = {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "model_type": "ernie4_5_moe",
        "vocab_size": 512,
        "hidden_size": hidden,
        "intermediate_size": middle,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": size,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "use_bias": False,
        "num_nextn_predict_layers": 1,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    g = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        tensors[f"{name}.weight"] = torch.randn(rows, columns, generator=g) / columns**0.5

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = 1 + 0.2 * torch.randn(hidden, generator=g)

    def mlp(name: str, width: int) -> None:
        for part in ("gate", "up"):
            linear(f"{name}.{part}_proj", width, hidden)
        linear(f"{name}.down_proj", hidden, width)

    def layer(name: str) -> None:
        for part in "qkvo":
            linear(f"{name}.self_attn.{part}_proj", hidden, hidden)
        norm(f"{name}.input_layernorm")
        norm(f"{name}.post_attention_layernorm")

    for name in ("model.embed_tokens", "lm_head"):
        linear(name, 512, hidden)
    norm("model.norm")
    for i in range(2):
        layer(f"model.layers.{i}")
    mlp("model.layers.0.mlp", middle)
    for expert in range(4):
        mlp(f"model.layers.1.mlp.experts.{expert}", 32)
    mlp("model.layers.1.mlp.shared_experts", 32)
    linear("model.layers.1.mlp.gate", 4, hidden)
    tensors["model.layers.1.mlp.moe_statics.e_score_correction_bias"] = torch.zeros(1, 4)
    layer("model.mtp_block.0")
    mlp("model.mtp_block.0.mlp", middle)
    norm("model.mtp_emb_norm.0")
    norm("model.mtp_hidden_norm.0")
    linear("model.mtp_linear_proj.0", hidden, 2 * hidden)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_mtp(ernie: Path) -> None:
    prompts = random_prompts((3, 40, 100))
    with engine(ernie) as llm:
        want = generate(llm, prompts, 24)
    with engine(ernie, speculative_config={"method": "mtp", "num_speculative_tokens": 1}) as llm:
        before = acceptance(llm)
        assert generate(llm, prompts, 24) == want
        counts = acceptance(llm) - before
    assert counts.drafts > 20
    assert counts.proposed == counts.drafts
