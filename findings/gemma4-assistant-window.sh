#!/usr/bin/env bash
# One would guess: a sliding layer of a Gemma 4 assistant sees as many keys as the target's, `sliding_window` of them:
# it reads the target's own keys and values and has the same number in its config.
# What happens: transformers builds the assistant's mask by flipping its bidirectional sliding-window mask, which allows
# distances up to `sliding_window` and that one too. One more key is seen: 9 for a window of 8. Shown by the gradient of
# the logits with respect to the values.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet torch==2.13.0 transformers==5.24.0
env/bin/python -W ignore - <<'PY'
import torch, transformers
from transformers import Gemma4AssistantConfig, Gemma4AssistantForCausalLM, Gemma4ForCausalLM, Gemma4TextConfig

WINDOW, KEYS = 8, 20
torch.manual_seed(0)

def text_config(layers, **more):
    return Gemma4TextConfig(
        num_hidden_layers=layers, layer_types=["sliding_attention"] * (layers - 1) + ["full_attention"],
        hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=16, global_head_dim=32,
        vocab_size=64, sliding_window=WINDOW, hidden_size_per_layer_input=0, vocab_size_per_layer_input=0, **more,
    )

assistant = Gemma4AssistantForCausalLM(Gemma4AssistantConfig(text_config=text_config(2), backbone_hidden_size=32)).eval()
states = {kind: tuple(torch.randn(1, 1, KEYS, size, requires_grad=True) for _ in "kv")
          for kind, size in (("sliding_attention", 16), ("full_attention", 32))}
out = assistant(inputs_embeds=torch.randn(1, 1, 64), position_ids=torch.tensor([[KEYS - 1]]), shared_kv_states=states)
out.logits.square().sum().backward()
seen = {kind: int(values.grad.abs().sum((0, 1, 3)).count_nonzero()) for kind, (_, values) in states.items()}

target = Gemma4ForCausalLM(text_config(2, num_kv_shared_layers=0)).eval()
first = target.model.layers[0].self_attn.v_proj
kept = []
first.register_forward_hook(lambda module, given, out: (out.retain_grad(), kept.append(out))[1])
ids = torch.arange(KEYS)[None]
embedded = target.get_input_embeddings()(ids).detach()
residual = []
target.model.layers[0].self_attn.register_forward_hook(lambda module, given, out: residual.append(out[0]))
target(inputs_embeds=embedded)
residual[0][0, -1].square().sum().backward()
of_target = int(kept[0].grad.abs().sum((0, 2)).count_nonzero())
print(f"transformers {transformers.__version__}, window {WINDOW}, {KEYS} keys: the target's sliding layer sees {of_target}, "
      f"the assistant's {seen['sliding_attention']}, its full layer {seen['full_attention']}")
assert (of_target, seen["sliding_attention"], seen["full_attention"]) == (WINDOW, WINDOW + 1, KEYS)
PY
