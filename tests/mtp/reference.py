"""An assistant in plain PyTorch, and what it needs from a running engine; written from transformers' module.

transformers itself is the judge where it knows the model (``recorded``); this stands in for it on other texts, sizes
and devices, and is compared with it there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

SLIDING, FULL = "sliding_attention", "full_attention"


class ReferenceAssistant:
    """Drafts of an assistant's folder."""

    def __init__(self, folder: Path, embedding: Tensor) -> None:
        """``embedding``: the target's table, ``[vocabulary, backbone_hidden_size]``, unscaled."""
        self.config = json.loads((folder / "config.json").read_text())
        self.text = self.config["text_config"]
        self.w = {n: t.to(embedding.device) for n, t in load_file(folder / "model.safetensors").items()}
        self.embedding, self.eps = embedding, self.text["rms_norm_eps"]

    def draft(self, token: int, hidden: Tensor, kv: dict[str, tuple[Tensor, Tensor]], k: int) -> list[int]:
        """``k`` tokens after ``token``.

        Args:
            hidden: ``[backbone_hidden_size]``, the target's after its final norm, where it chose ``token``.
            kv: layer type -> keys and values of the target's last such layer, ``[length, kv_heads, head_dim]``.
        """
        out = []
        position = kv[FULL][0].shape[0] - 1
        for _ in range(k):
            scaled = self.embedding[token] * self.embedding.shape[1] ** 0.5
            x = F.linear(torch.cat([scaled, hidden]), self.w["pre_projection.weight"])
            for i, kind in enumerate(self.text["layer_types"]):
                x = self._layer(x, i, kind, *kv[kind], position)
            x = self._norm(x, "model.norm")
            hidden, token = F.linear(x, self.w["post_projection.weight"]), self._token(x)
            out.append(token)
        return out

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.eps)

    def _layer(self, x: Tensor, i: int, kind: str, keys: Tensor, values: Tensor, position: int) -> Tensor:
        name = f"model.layers.{i}"

        def product(y: Tensor, part: str) -> Tensor:
            return F.linear(y, self.w[f"{name}.{part}_proj.weight"])

        window = self.text["sliding_window"] if kind == SLIDING else keys.shape[0]
        q = product(self._norm(x, f"{name}.input_layernorm"), "self_attn.q").unflatten(0, (-1, keys.shape[-1]))
        q = self._rotate(self._norm(q, f"{name}.self_attn.q_norm"), kind, position)
        groups = q.unflatten(0, (keys.shape[1], -1))  # [kv heads, queries of each, dim]
        share = torch.einsum("hqd,lhd->hql", groups, keys[-window:]).softmax(-1)
        heads = torch.einsum("hql,lhd->hqd", share, values[-window:]).flatten()
        x = x + self._norm(product(heads, "self_attn.o"), f"{name}.post_attention_layernorm")
        y = self._norm(x, f"{name}.pre_feedforward_layernorm")
        y = product(F.gelu(product(y, "mlp.gate"), approximate="tanh") * product(y, "mlp.up"), "mlp.down")
        return (x + self._norm(y, f"{name}.post_feedforward_layernorm")) * self.w[f"{name}.layer_scalar"]

    def _rotate(self, x: Tensor, kind: str, position: int) -> Tensor:
        """Rotary embedding of ``[heads, dim]``, halves apart; "proportional" leaves the last frequencies at 0."""
        rope, half = self.text["rope_parameters"][kind], x.shape[-1] // 2
        turning = int(rope.get("partial_rotary_factor", 1.0) * half)
        angle = rope["rope_theta"] ** (-torch.arange(half, device=x.device) / half) * position
        angle[turning:] = 0
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def _token(self, x: Tensor) -> int:
        head = self.w["model.embed_tokens.weight"]
        if not self.config.get("use_ordered_embeddings"):
            return int((head @ x).argmax())
        chosen = (self.w["masked_embedding.centroids.weight"] @ x).topk(self.config["centroid_intermediate_top_k"])
        tokens = self.w["masked_embedding.token_ordering"].view(self.config["num_centroids"], -1)[chosen.indices]
        return int(tokens.flatten()[(head[tokens.flatten()] @ x).argmax()])


def stored(runner: Any, layer: str, row: int, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values that the engine's cache holds for a layer and a request: ``[length, kv_heads, head_dim]``.

    Positions before a sliding window are zeros: their blocks have been given back.
    """
    gid = next(i for i, g in enumerate(runner.kv_cache_config.kv_cache_groups) if layer in g.layer_names)
    attention = runner.compilation_config.static_forward_context[layer]
    cache = attention.kv_cache
    table = runner.input_batch.block_table[gid]
    blocks = table.get_device_tensor(row + 1)[row, : -(-length // table.block_size)].long()
    keys, values = (t[blocks] for t in cache.unbind(1)) if runner.device.type != "cpu" else of_cpu(cache, blocks)
    if attention.kv_cache_dtype.startswith("fp8"):
        keys, values = (t.view(torch.float8_e4m3fn).float() for t in (keys, values))
        keys, values = keys * attention._k_scale, values * attention._v_scale
    held = (blocks != 0)[:, None, None, None]
    return (keys.float() * held).flatten(0, 1)[:length], (values.float() * held).flatten(0, 1)[:length]


def of_cpu(cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of some blocks of CPU_ATTN's cache, ``[blocks, block size, kv_heads, head_dim]``.

    It keeps the keys of each 32 positions transposed (its instruction set ``vec``), of each 16 where blocks are no
    multiple of 32 (``vec16``).
    """
    keys, values = cache[0][blocks], cache[1][blocks]  # [blocks, kv_heads, block size, head_dim]
    count, heads, size, dim = keys.shape
    run = 16 if size % 32 else 32
    keys = keys.reshape(count, heads, size // run, dim, run).permute(0, 2, 4, 1, 3).reshape(count, size, heads, dim)
    return keys, values.transpose(1, 2)
