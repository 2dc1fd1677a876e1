#!/usr/bin/env bash
# One would guess: a cast to float8_e4m3fn, which has no infinity, makes NaN of what lies beyond its range, as ml_dtypes does
# and as PyTorch did up to 2.12; or else that PyTorch treats such values alike for both of its float8 types.
# What happens: from PyTorch 2.13 on the cast saturates, without a setting: 1e6 is 448, and so is infinity. NaN stays NaN.
# float8_e5m2 still makes infinity of both. A scale that is too small or has overflowed, which used to show as NaN in the
# weight or the KV cache, now gives finite numbers that are wrong, and checks for NaN after the cast find nothing.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet torch==2.13.0 numpy==2.2.6 ml-dtypes==0.5.4
cat >cast.py <<'PY'
import ml_dtypes, torch

nan, inf = float("nan"), float("inf")
values = [440.0, 464.0, 480.0, 1e6, -1e6, inf, nan]
expected = {
    "float8_e4m3fn": ([448.0, 448.0, nan, nan, nan, nan, nan], [448.0, 448.0, 448.0, 448.0, -448.0, 448.0, nan]),
    "float8_e5m2": ([448.0, 448.0, 512.0, inf, -inf, inf, nan],) * 2,
}
print("torch", torch.__version__, "ml_dtypes", ml_dtypes.__version__, values)
for name, both in expected.items():
    given = torch.tensor(values)
    other = torch.from_numpy(given.numpy().astype(getattr(ml_dtypes, name)).astype("float32"))
    for who, back, right in zip(("ml_dtypes", "torch"), (other, given.to(getattr(torch, name)).float()), both):
        print(f"{name} by {who}: {back.tolist()}")
        torch.testing.assert_close(back, torch.tensor(right), rtol=0, atol=0, equal_nan=True)
for dtype in (torch.bfloat16, torch.float16):
    assert torch.tensor(inf, dtype=dtype).to(torch.float8_e4m3fn).float() == 448
PY
env/bin/python -W ignore cast.py
