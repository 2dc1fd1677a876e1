#!/usr/bin/env bash
# One would guess: a tensor that safetensors saves and get_tensor() reads can be read in slices too, as loaders that split
# weights over GPUs do, and get_slice().get_shape() is the shape of that tensor.
# What happens: PyTorch's float4_e2m1fn_x2, two values a byte, is saved as F4 with twice the last dimension. get_tensor()
# turns the shape back. A slice does not: get_shape() is the doubled one, and every slice raises, by rows as well, even
# [:]. load() of a file's bytes knows neither F4 nor the F8_E8M0 of its scales, which save() wrote; slices of F8_E8M0 work.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet torch==2.13.0 numpy==2.2.6 safetensors==0.8.0
cat >slices.py <<'PY'
import safetensors, torch
from safetensors.torch import load, load_file, save, save_file

tensors = {
    "weight": torch.arange(32, dtype=torch.uint8).view(2, 16).view(torch.float4_e2m1fn_x2),
    "scale": torch.arange(120, 124, dtype=torch.uint8).view(2, 2).view(torch.float8_e8m0fnu),
}
same = lambda a, b: a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
save_file(tensors, "file.safetensors")
print("safetensors", safetensors.__version__, "torch", torch.__version__)
for name, back in load_file("file.safetensors").items():
    assert same(back, tensors[name])
errors = {}
with safetensors.safe_open("file.safetensors", "pt") as file:
    for name, tensor in tensors.items():
        assert same(file.get_tensor(name), tensor)
        part = file.get_slice(name)
        print(name, tensor.dtype, "get_tensor:", tuple(tensor.shape), "get_slice:", part.get_shape())
        for text, index in (("[:]", slice(None)), ("[0:1]", slice(0, 1)), ("[:, 0:1]", (slice(None), slice(0, 1)))):
            try:
                assert same(part[index], tensor[index])
                errors[name, text] = None
            except RuntimeError as error:
                errors[name, text] = f"RuntimeError: {error}"
            print("   ", text, errors[name, text] or "right")
        try:
            load(save({name: tensor}))
            raise SystemExit("load() knows it")
        except KeyError as error:
            print("    load(save(...)): KeyError:", error)
    assert file.get_slice("weight").get_shape() == [2, 32]
assert all(bool(error) == (name == "weight") for (name, _), error in errors.items()), errors
PY
env/bin/python -W ignore slices.py
