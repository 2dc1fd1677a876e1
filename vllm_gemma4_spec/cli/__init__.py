"""The command ``vllm-gemma4-spec``: one module per subcommand, imported only when it runs."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from vllm_gemma4_spec._version import __version__
from vllm_gemma4_spec.errors import Gemma4SpecError

NAME = "vllm-gemma4-spec"
# Of click, which newer versions of typer carry inside themselves.
_UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(
    name=NAME,
    pretty_exceptions_enable=False,
    help="Serve Gemma 4 with speculation on vLLM 0.19.1: checks, models and tools around the plugin.",
)

# Subcommand -> module that holds its function `command`.
COMMANDS = {
    "demo": "vllm_gemma4_spec.cli.demo",
    "demo-models": "vllm_gemma4_spec.cli.demo_models",
    "bench": "vllm_gemma4_spec.cli.bench",
    "doctor": "vllm_gemma4_spec.cli.doctor",
    "plan": "vllm_gemma4_spec.cli.plan",
    "patches": "vllm_gemma4_spec.cli.patches",
    "inspect": "vllm_gemma4_spec.cli.inspect",
    "repair": "vllm_gemma4_spec.cli.repair",
    "quantize": "vllm_gemma4_spec.cli.quantize",
    "top": "vllm_gemma4_spec.cli.top",
    "schema": "vllm_gemma4_spec.cli.schema",
}


def _version(value: bool) -> None:
    if value:
        typer.echo(f"{NAME} {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _register(arguments: list[str]) -> None:
    """Add the subcommand asked for; all of them where that is not known, as for ``--help``."""
    asked = {name: COMMANDS[name] for name in arguments[:1] if name in COMMANDS}
    for name, module in (asked or COMMANDS).items():
        function: Callable[..., Any] = importlib.import_module(module).command
        app.command(name)(function)
    if asked and shutil.get_terminal_size().columns < 80:
        app.rich_markup_mode = None  # rich's table cuts the names of options there, click's plain help does not


def _terminated(number: int, frame: Any) -> None:
    """SIGTERM unwinds the stack as Ctrl-C does: no process, half-made folder or scratch file is left."""
    sys.exit(128 + number)


def main() -> None:
    """Console entry point: a user's mistake ends with one line on stderr and exit code 2."""
    signal.signal(signal.SIGTERM, _terminated)
    arguments = sys.argv[1:] or ["--help"]
    _register(arguments)
    try:
        sys.exit(app(arguments, prog_name=NAME, standalone_mode=False))
    except _UsageError as error:
        where = error.ctx.command_path if error.ctx else NAME
        text = " ".join(error.format_message().split()).rstrip(".")
        typer.echo(f"{where}: {text}; `{where} --help` lists the options", err=True)
        sys.exit(2)
    except Gemma4SpecError as error:
        typer.echo(f"{NAME}: {error}", err=True)
        sys.exit(2)
    except ImportError as error:
        if not (error.name or "").startswith("vllm_gemma4_spec.demo"):
            raise
        advice = "pip install vllm-gemma4-spec-demo; from a checkout: pip install ./demo"
        typer.echo(f"{NAME}: the demo is a package of its own (a server needs no trainer): {advice}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is flushed into it at exit
        sys.exit(1)
