#!/usr/bin/env bash
# One would guess: a Gemma 4 config saved by one release of transformers 5 is read the same by another, or refused; and
# the sizes of layer i stand under the key str(i).
# What happens: from 5.15 on the full layers' head size and KV heads go into `per_layer_config`, and `global_head_dim`
# and `num_global_key_value_heads` are not written. 5.5.4 reads the file without a word, with its own defaults in their
# place. The keys are zero-padded to the width of the layer count: layer 5 is "5" of 6 layers and "05" of 12.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
for release in 5.24.0 5.5.4; do
    python3 -m venv "env-$release"
    "env-$release/bin/pip" install --quiet "transformers==$release"
done
cat >write.py <<'PY'
import json, transformers
from transformers import Gemma4TextConfig

for layers, key in ((6, "5"), (12, "05")):
    kinds = (["sliding_attention"] * 5 + ["full_attention"]) * (layers // 6)
    config = Gemma4TextConfig(
        num_hidden_layers=layers, layer_types=kinds, hidden_size=32, num_attention_heads=4, attention_k_eq_v=True,
        head_dim=8, global_head_dim=16, num_key_value_heads=2, num_global_key_value_heads=1,
    )
    config.save_pretrained(f"saved-{layers}")
    with open(f"saved-{layers}/config.json") as file:
        saved = json.load(file)
    print("written by", transformers.__version__, saved["per_layer_config"])
    assert saved["per_layer_config"][key] == {"head_dim": 16, "num_key_value_heads": 1}
    assert not saved.keys() & {"global_head_dim", "num_global_key_value_heads"}
PY
cat >read.py <<'PY'
import transformers, warnings
from transformers import AutoConfig

warnings.simplefilter("error")
config = AutoConfig.from_pretrained("saved-12")
print("read by", transformers.__version__, "- full layers: head size", config.global_head_dim,
      "(16 was given), KV heads", config.num_global_key_value_heads, "(1 was given)")
assert (config.global_head_dim, config.num_global_key_value_heads) == (512, None)
PY
env-5.24.0/bin/python write.py
env-5.5.4/bin/python read.py
