"""EAGLE and EAGLE3 heads in plain PyTorch: whole context, no cache, no blocks. Written from the papers' layout.

Also their checkpoints, as published heads have them: the tensors of Llama layers, the first with an input twice
as wide (EAGLE3), a projection ``fc``, and neither embeddings nor an output head, which are the target's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

EPS, THETA, AUX_LAYERS = 1e-6, 10000.0, (1, 3, 5)


def save_head(
    folder: Path,
    method: str,
    layer_types: list[str],
    head_dims: list[int],
    architecture: str,
    seed: int = 5,
    heads: int = 2,
    hidden: int = 64,
    vocabulary: int = 512,
) -> Path:
    """Write a random head; by default for the tiny target."""
    inner, kv_heads = 96, 1
    g = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=g) / columns**0.5

    def norm() -> torch.Tensor:
        return 1 + 0.2 * torch.randn(hidden, generator=g)

    eagle3 = method == "eagle3"
    weights = {"fc.weight": matrix(hidden, hidden * (len(AUX_LAYERS) if eagle3 else 2))}
    for i, dim in enumerate(head_dims):
        width = hidden * 2 if eagle3 and i == 0 else hidden
        layer = {
            "self_attn.q_proj": matrix(heads * dim, width),
            "self_attn.k_proj": matrix(kv_heads * dim, width),
            "self_attn.v_proj": matrix(kv_heads * dim, width),
            "self_attn.o_proj": matrix(hidden, heads * dim),
            "mlp.gate_proj": matrix(inner, hidden),
            "mlp.up_proj": matrix(inner, hidden),
            "mlp.down_proj": matrix(hidden, inner),
            "post_attention_layernorm": norm(),
        }
        if eagle3:
            layer["hidden_norm"] = norm()
        if eagle3 or i > 0:
            layer["input_layernorm"] = norm()
        weights |= {f"layers.{i}.{name}.weight": w for name, w in layer.items()}
    if eagle3:
        weights["norm.weight"] = norm()
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": len(head_dims),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dims[0],
        "head_dims": head_dims,
        "max_position_embeddings": 1024,
        "rms_norm_eps": EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        "sliding_window": 32,
        "dtype": "float32",
    }
    if eagle3:
        config |= {"layer_types": layer_types, "eagle_aux_hidden_state_layer_ids": list(AUX_LAYERS)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class ReferenceHead:
    """Drafts of a head saved by :func:`save_head`, from the target's embedding matrix and hidden states."""

    def __init__(self, folder: Path, embedding: torch.Tensor) -> None:
        from safetensors.torch import load_file

        self.config = json.loads((folder / "config.json").read_text())
        self.w = load_file(folder / "model.safetensors")
        self.embedding = embedding  # [vocabulary, hidden size]; also the output head of a head without one
        self.head = self.w.get("lm_head.weight", embedding)
        self.d2t = self.w.get("d2t")  # offset from a draft token's number to the target's
        self.eagle3 = "layer_types" in self.config
        self.windows = [
            self.config["sliding_window"] if kind == "sliding_attention" else None
            for kind in self.config.get("layer_types", [None] * len(self.config["head_dims"]))
        ]

    def draft(self, context: list[int], hidden: torch.Tensor, k: int) -> list[int]:
        """``k`` tokens after ``context`` (n + 1 tokens); ``hidden``: ``[n, …]``, of the target, for the first n."""
        states = F.linear(hidden, self.w["fc.weight"]) if self.eagle3 else hidden
        tokens, drafted = context[1:], []
        for _ in range(k):
            out, following = self._forward(F.embedding(torch.tensor(tokens), self.embedding), states)
            token = int((out[-1] @ self.head.T).argmax())
            drafted.append(token if self.d2t is None else token + int(self.d2t[token]))
            tokens, states = [*tokens, drafted[-1]], torch.cat([states, following[-1:]])
        return drafted

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.w[f"{name}.weight"], EPS)

    def _forward(self, embeds: torch.Tensor, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states for the output head, and those that the next draft step starts from."""
        if not self.eagle3:
            states = F.linear(torch.cat([embeds, states], -1), self.w["fc.weight"])
        for i in range(len(self.windows)):
            name = f"layers.{i}"
            if self.eagle3 and i == 0:
                x = torch.cat(
                    [self._norm(embeds, f"{name}.input_layernorm"), self._norm(states, f"{name}.hidden_norm")], -1
                )
            else:
                x = self._norm(states, f"{name}.input_layernorm") if i > 0 else states
            states = states + self._attention(x, i)
            x = self._norm(states, f"{name}.post_attention_layernorm")
            gate, up = (F.linear(x, self.w[f"{name}.mlp.{p}_proj.weight"]) for p in ("gate", "up"))
            states = states + F.linear(F.silu(gate) * up, self.w[f"{name}.mlp.down_proj.weight"])
        return (self._norm(states, "norm") if self.eagle3 else states), states

    def _attention(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        name, dim, n = f"layers.{layer}.self_attn", self.config["head_dims"][layer], x.shape[0]
        q, k, v = (
            F.linear(x, self.w[f"{name}.{p}_proj.weight"]).view(n, -1, dim).transpose(0, 1) for p in ("q", "k", "v")
        )
        q, k = self._rotate(q), self._rotate(k)
        distance = torch.arange(n)[:, None] - torch.arange(n)
        seen = (distance >= 0) & (distance < (self.windows[layer] or n))
        heads = F.scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q), seen)
        return F.linear(heads.transpose(0, 1).reshape(n, -1), self.w[f"{name}.o_proj.weight"])

    @staticmethod
    def _rotate(x: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of ``[heads, positions, dim]``, halves apart."""
        half = x.shape[-1] // 2
        angle = torch.arange(x.shape[1])[:, None] * THETA ** (-torch.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
