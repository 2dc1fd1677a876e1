#!/usr/bin/env bash
# One would guess: torch.isfinite() is False for NaN in each type that it takes, and a value that a type has no room for
# becomes NaN in a cast, or an error.
# What happens: in float8_e8m0fnu, the type of the scales of MXFP4 and MXFP8, isfinite is True for NaN, of which isnan is
# True as well; e4m3 raises, e5m2 and the same scales as float32 are right. A negative number loses its sign in the cast:
# -3 is 4, as 3 is, and zero is 2**-127. ml_dtypes makes NaN of both. So isfinite(scales).all() passes whatever the scales.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet torch==2.13.0 numpy==2.2.6 ml-dtypes==0.5.4
cat >scales.py <<'PY'
import ml_dtypes, torch

print("torch", torch.__version__, "ml_dtypes", ml_dtypes.__version__)
nan, inf = float("nan"), float("inf")
values = torch.tensor([1.0, 3.0, nan, inf, -3.0, 0.0])
scales = values.to(torch.float8_e8m0fnu)
by_ml_dtypes = torch.from_numpy(values.numpy().astype(ml_dtypes.float8_e8m0fnu).astype("float32"))
print("given       ", values.tolist())
print("by torch    ", scales.float().tolist())
print("by ml_dtypes", by_ml_dtypes.tolist())
print("isnan       ", scales.isnan().tolist())
print("isfinite    ", scales.isfinite().tolist())
equal = dict(rtol=0, atol=0, equal_nan=True)
torch.testing.assert_close(scales.float(), torch.tensor([1.0, 4.0, nan, nan, 4.0, 2.0**-127]), **equal)
torch.testing.assert_close(by_ml_dtypes, torch.tensor([1.0, 4.0, nan, nan, nan, nan]), **equal)
assert scales.isnan().tolist() == [False, False, True, True, False, False]
assert scales.isfinite().all()
assert scales.float().isfinite().tolist() == [True, True, False, False, True, True]
assert values.to(torch.float8_e5m2).isfinite().tolist() == [True, True, False, False, True, True]
try:
    values.to(torch.float8_e4m3fn).isfinite()
    raise SystemExit("isfinite takes float8_e4m3fn")
except NotImplementedError as error:
    print("e4m3: NotImplementedError:", error)
PY
env/bin/python -W ignore scales.py
