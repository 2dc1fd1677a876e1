"""The plan's groups beside those of the real engine, from the genuine configs.

The engine is stopped once it has its groups: the layers keep their number, kinds, KV heads and head sizes, and
are narrow (hidden size, vocabulary, experts), which no KV cache spec depends on.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import vllm_gemma4_spec
from tests.support.engine import engine
from vllm_gemma4_spec.ops.plan import groups, model

ARTIFACTS = os.environ.get("GEMMA4_ARTIFACTS")
NARROW = {
    "hidden_size": 32, "intermediate_size": 32, "vocab_size": 512, "vocab_size_per_layer_input": 512,
    "moe_intermediate_size": 16, "num_attention_heads": 16, "architectures": ["Gemma4ForCausalLM"],
}  # fmt: skip


class Stop(Exception):  # noqa: N818
    """The engine knows its groups."""


def narrow(name: str, folder: Path) -> Path:
    config = json.loads(Path(str(ARTIFACTS), "gemma4", "models", name, "config.json").read_text())["text_config"]
    experts = {"num_experts": 4, "top_k_experts": 2} if config.get("enable_moe_block") else {}
    per_layer = {"hidden_size_per_layer_input": 16} if config.get("hidden_size_per_layer_input") else {}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | NARROW | experts | per_layer))
    return folder


def owner_and_layer(name: str) -> tuple[str, int]:
    owner = "drafter" if name.startswith("draft_model.") else "target"
    return owner, int(name.split(".layers.")[1].split(".")[0])


def members(group: groups.Group) -> list[tuple[str, int]]:
    return [("drafter", n) for n in group.drafter_layers] + [("target", n) for n in group.target_layers]


@pytest.mark.skipif(not ARTIFACTS, reason="GEMMA4_ARTIFACTS is unset: no genuine configs")
@pytest.mark.parametrize(("target", "count"), [("gemma-4-31B-it", 22), ("gemma-4-26B-A4B-it", 7)])
def test_every_group_and_member_is_the_engines(
    target: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 26B-A4B the full layers of both models have 2 KV heads of 512: one spec, so they share a group of 9."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.engine import core

    # Refused by the CPU's kernels only, which do not run here.
    monkeypatch.setattr(CPUAttentionBackend, "get_supported_head_sizes", classmethod(lambda cls: [256, 512]))
    vllm_gemma4_spec.apply()
    original, seen = core.get_kv_cache_configs, []

    def stop(*args: Any) -> Any:
        seen.extend(original(*args))
        raise Stop

    monkeypatch.setattr(core, "get_kv_cache_configs", stop)
    folders = [narrow(name, tmp_path / name) for name in (target, "gemma-4-E4B-it")]
    options = {"dtype": "bfloat16", "load_format": "dummy", "max_model_len": 512, "num_gpu_blocks_override": None}
    with pytest.raises(Stop), engine(*folders, **options):
        pass
    found = [
        (g.kv_cache_spec.block_size, g.kv_cache_spec.page_size_bytes, sorted(map(owner_and_layer, g.layer_names)))
        for g in seen[0].kv_cache_groups
    ]
    planned = groups.plan_cache(*[model.load(f) for f in folders], memory_bytes=1 << 30, context=512)
    assert [(g.block_size, g.page_bytes, members(g)) for g in planned.groups] == found
    assert len(found) == count
