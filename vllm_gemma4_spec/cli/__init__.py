"""The command ``vllm-gemma4-spec``: one module per subcommand, imported only when it runs."""

from __future__ import annotations

import importlib
import importlib.util
import os
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
    rich_markup_mode=None,  # rich takes a quarter of a second to import, and its tables cut the names of options
    help="Serve Gemma 4 with speculation on vLLM 0.19.1: checks, models and tools around the plugin.",
)

_PACKAGE = "vllm_gemma4_spec.cli"
# Subcommand -> module that holds its function `command`.
COMMANDS = {
    "demo": f"{_PACKAGE}.demo",
    "demo-models": f"{_PACKAGE}.demo_models",
    "bench": f"{_PACKAGE}.bench",
    "doctor": f"{_PACKAGE}.doctor",
    "plan": f"{_PACKAGE}.plan",
    "patches": f"{_PACKAGE}.patches",
    "inspect": f"{_PACKAGE}.inspect",
    "repair": f"{_PACKAGE}.repair",
    "quantize": f"{_PACKAGE}.quantize",
    "top": f"{_PACKAGE}.top",
    "schema": f"{_PACKAGE}.schema",
}
# What the list of commands says of each, without importing any.
SUMMARIES = {
    "demo": "Serve a small trained pair, ask it, and show what drafts did.",
    "demo-models": "Train the pair of the demo on this machine's CPU, once.",
    "bench": "Measure tok/s, latency and acceptance of a server, or of two.",
    "doctor": "Check versions, device and patches here, or a running server.",
    "plan": "Compute memory, time per step and the best k from two configs.",
    "patches": "List every patch, and whether it fits the vLLM installed.",
    "inspect": "Show what a checkpoint holds, and what vLLM makes of it.",
    "repair": "Write a copy of a checkpoint without NaN block scales.",
    "quantize": "Quantize a bf16 checkpoint with ModelOpt.",
    "top": "Show a running server live in the terminal.",
    "schema": "Print the JSON Schema of a command's --json.",
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
    """Add the subcommand asked for; where none is, only what the list of commands shows of each."""
    asked = arguments[0] if arguments and arguments[0] in COMMANDS else None
    completing = f"_{NAME}_COMPLETE".replace("-", "_").upper() in os.environ
    for name, module in COMMANDS.items():
        if completing or name == asked:
            function: Callable[..., Any] = importlib.import_module(module).command
            app.command(name)(function)
        elif not asked:
            app.command(name, short_help=SUMMARIES[name])(lambda: None)


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
        missing = (error.name or "").partition(".")[0]
        if (error.name or "").startswith("vllm_gemma4_spec.demo"):
            advice = "the demo is a package of its own (a server needs no trainer): in a checkout, pip install ./demo"
        elif missing and missing != "vllm_gemma4_spec" and importlib.util.find_spec(missing) is None:
            advice = f"{arguments[0]} needs {missing}, which is not installed here: run it where vLLM is, or install it"
        else:
            raise
        typer.echo(f"{NAME}: {advice}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is flushed into it at exit
        sys.exit(1)
