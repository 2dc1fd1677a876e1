"""The demo's MTP assistant: trained on the demo's target, as the published ones are on theirs.

transformers 5.5.4 has no assistant, so the network stands here once more, over whole answers at a time: in pass j the
query of every position p sees the target's keys up to p, the embedding of token p + j and the state of the pass
before, and learns token p + j + 1. What is saved has the published names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_gemma4_spec.demo.train import IGNORED, Recipe, batches

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import Gemma4ForCausalLM, PreTrainedTokenizerFast

RECIPE = Recipe(steps=100, batch_tokens=1024, learning_rate=6e-3, seed=0)
PASSES = 3
HIDDEN, INNER, HEADS = 64, 160, 4
LAYERS = ["sliding_attention"] * 3 + ["full_attention"]
EPS = 1e-6


def config(target: Gemma4ForCausalLM) -> dict[str, Any]:
    """``config.json`` of the assistant of ``target``."""
    theirs = target.config.to_dict()
    copied = (
        "vocab_size head_dim global_head_dim num_key_value_heads num_global_key_value_heads attention_k_eq_v "
        "sliding_window max_position_embeddings rope_parameters pad_token_id bos_token_id eos_token_id"
    )
    text = {name: theirs[name] for name in copied.split()} | {
        "model_type": "gemma4_text",
        "vocab_size_per_layer_input": 0,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": len(LAYERS),
        "layer_types": LAYERS,
        "num_attention_heads": HEADS,
        "rms_norm_eps": EPS,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": len(LAYERS),
        "enable_moe_block": False,
        "use_double_wide_mlp": False,
        "final_logit_softcapping": None,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    return {
        "model_type": "gemma4_assistant",
        "architectures": ["Gemma4AssistantForCausalLM"],
        "backbone_hidden_size": theirs["hidden_size"],
        "use_ordered_embeddings": False,
        "tie_word_embeddings": True,
        "dtype": "float32",
        "text_config": text,
    }


def fresh(values: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Untrained tensors; linear layers have the variance of their width, and queries start small."""
    import torch

    from vllm_gemma4_spec.mtp.config import Gemma4AssistantConfig
    from vllm_gemma4_spec.mtp.weights import expected

    g = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in expected(Gemma4AssistantConfig(**json.loads(json.dumps(values)))).items():
        if "norm" in name or name.endswith("layer_scalar"):
            out[name] = torch.full(shape, 0.4 if "q_norm" in name else 1.0)
        else:
            out[name] = torch.randn(shape, generator=g) * shape[-1] ** -0.5
    return {name: tensor.requires_grad_(not name.endswith("layer_scalar")) for name, tensor in out.items()}


class Network:
    """An assistant over all positions of some texts."""

    def __init__(self, values: dict[str, Any], weights: dict[str, Tensor]) -> None:
        self.text, self.w = values["text_config"], weights

    def run(self, inputs: Tensor, kv: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """One pass.

        Args:
            inputs: ``[batch, length, 2 * backbone]``, embedding and state side by side.
            kv: layer type -> keys and values, ``[batch, kv_heads, length, head_dim]``.

        Returns:
            What the head takes, ``[batch, length, hidden]``, and the next state, ``[batch, length, backbone]``.
        """
        x = inputs @ self.w["pre_projection.weight"].T
        for i, kind in enumerate(self.text["layer_types"]):
            x = self._layer(x, f"model.layers.{i}", kind, *kv[kind])
        x = self._norm(x, "model.norm")
        return x, x @ self.w["post_projection.weight"].T

    def head(self, x: Tensor) -> Tensor:
        """``[..., hidden]`` -> logits, ``[..., vocab]``."""
        return x @ self.w["model.embed_tokens.weight"].T

    def _norm(self, x: Tensor, name: str) -> Tensor:
        import torch.nn.functional as F

        return F.rms_norm(x, x.shape[-1:], self.w[f"{name}.weight"], EPS)

    def _layer(self, x: Tensor, name: str, kind: str, keys: Tensor, values: Tensor) -> Tensor:
        import torch
        import torch.nn.functional as F

        length = x.shape[1]
        away = torch.arange(length)[:, None] - torch.arange(length)
        window = self.text["sliding_window"] if kind == "sliding_attention" else length
        q = self._norm(x, f"{name}.input_layernorm") @ self.w[f"{name}.self_attn.q_proj.weight"].T
        q = self._norm(q.unflatten(-1, (HEADS, -1)), f"{name}.self_attn.q_norm").transpose(1, 2)
        q = rotate(q, self.text["rope_parameters"][kind])
        share = HEADS // keys.shape[1]
        keys, values = keys.repeat_interleave(share, 1), values.repeat_interleave(share, 1)
        heads = F.scaled_dot_product_attention(q, keys, values, (away >= 0) & (away < window), scale=1.0)
        x = x + self._norm(
            heads.transpose(1, 2).flatten(2) @ self.w[f"{name}.self_attn.o_proj.weight"].T,
            f"{name}.post_attention_layernorm",
        )
        y = self._norm(x, f"{name}.pre_feedforward_layernorm")
        gate, up = (y @ self.w[f"{name}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        y = (F.gelu(gate, approximate="tanh") * up) @ self.w[f"{name}.mlp.down_proj.weight"].T
        return (x + self._norm(y, f"{name}.post_feedforward_layernorm")) * self.w[f"{name}.layer_scalar"]


def rotate(x: Tensor, rope: dict[str, Any]) -> Tensor:
    """Rotary embedding of ``[..., length, dim]``, halves apart; "proportional" leaves the last frequencies at 0."""
    import torch

    half = x.shape[-1] // 2
    frequency = rope["rope_theta"] ** (-torch.arange(half) / half)
    frequency[int(rope.get("partial_rotary_factor", 1.0) * half) :] = 0
    angle = torch.arange(x.shape[-2])[:, None] * frequency
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def look(target: Gemma4ForCausalLM, inputs: Tensor) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """The target's last hidden states and the keys and values that an assistant reads."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()  # without a config no layer forgets what its window has left
    with torch.no_grad():
        hidden = target.model(input_ids=inputs, past_key_values=cache, use_cache=True).last_hidden_state
    last = {kind: i for i, kind in enumerate(target.config.layer_types)}  # the target shares no layer's KV
    return hidden, {kind: (cache.layers[i].keys, cache.layers[i].values) for kind, i in last.items()}


def train(
    target: Gemma4ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe = RECIPE,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of an assistant trained on ``target``; ``progress(step, loss)`` after each step."""
    import torch
    import torch.nn.functional as F

    values = config(target)
    weights = fresh(values, recipe.seed)
    network, table = Network(values, weights), target.get_input_embeddings()
    learned = [w for w in weights.values() if w.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    warmup = max(1, round(recipe.warmup * recipe.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.02 + 0.49 * (1 + math.cos(math.pi * step / recipe.steps))),
    )
    stream = batches(tokenizer, recipe.seed + 1, recipe.batch_tokens)
    for step in range(recipe.steps):
        inputs, labels = next(stream)
        state, kv = look(target, inputs)
        loss = torch.zeros(())
        for j in range(1, PASSES + 1):
            # Rolled past the end: those places have no label.
            token = table(inputs.roll(-j, 1)).detach()
            wanted = labels.roll(-j - 1, 1)
            wanted[:, -j - 1 :] = IGNORED
            normed, state = network.run(torch.cat([token, state], -1), kv)
            place = wanted != IGNORED  # only they go through the output matrix: half of a text is prompt
            loss = loss + F.cross_entropy(network.head(normed[place]), wanted[place]) / PASSES
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        progress(step + 1, loss.item())
    return values, {name: w.detach() for name, w in weights.items()}


def save(values: dict[str, Any], weights: dict[str, Tensor], folder: Path) -> None:
    """A folder as the published assistants are."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    save_file({name: w.contiguous() for name, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})


def load(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What :func:`save` wrote."""
    from safetensors.torch import load_file

    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def acceptance(
    target: Gemma4ForCausalLM,
    values: dict[str, Any],
    weights: dict[str, Tensor],
    prompts: list[list[int]],
    answers: list[list[int]],
    k: int,
) -> list[float]:
    """Share of drafting steps in which the draft at each of the k positions is accepted, under greedy decoding.

    ``answers`` are the target's own; steps are counted as in ``measure.acceptance``.
    """
    import torch

    network, table = Network(values, weights), target.get_input_embeddings()
    steps, accepted = 0, [0] * k
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + answer])
        hidden, kv = look(target, ids)
        drafts: list[torch.Tensor] = []
        token, state = ids.roll(-1, 1), hidden
        with torch.no_grad():
            for _ in range(k):
                normed, state = network.run(torch.cat([table(token), state], -1), kv)
                token = network.head(normed).argmax(-1)
                drafts.append(token[0])
        place = 1
        while place < len(answer):
            steps, hits = steps + 1, 0
            at = len(prompt) + place - 2  # the last token in the cache; the one after it has just been chosen
            for draft, wanted in zip(drafts, answer[place:], strict=False):
                if int(draft[at]) != wanted:
                    break
                accepted[hits] += 1
                hits += 1
            place += hits + 1
    return [n / steps for n in accepted]
