"""The command line `medusa-ext`."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer

from medusa_ext.cli.calibrate import calibrate
from medusa_ext.cli.chat import chat
from medusa_ext.cli.convert import convert
from medusa_ext.cli.distill import distill
from medusa_ext.cli.files import export, inspect
from medusa_ext.cli.generate import generate
from medusa_ext.cli.train import train

app = typer.Typer(
    name="medusa-ext",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(generate)
app.command()(chat)
app.command()(inspect)
app.command()(export)
app.command()(distill)
app.command()(train)
app.command()(calibrate)
app.command()(convert)


@app.command()
def version() -> None:
    """Print the version, the devices that can be used, and the CPU's instruction sets."""
    from medusa_ext import _core

    devices, isas = _core.available_devices(), _core.available_isas()
    print(f"medusa-ext {_core.__version__} ({', '.join(devices)}; cpu: {', '.join(isas)})")


def _version_flag(given: bool) -> None:
    if given:
        version()
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_version_flag, help="As the command version."
        ),
    ] = False,
) -> None:
    """Language models on your own machine, several tokens per pass, exactly the same text."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 2 bad input, 1 another failure, 130 on ^C."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status; every failure is one line on stderr."""
    warnings.showwarning = _show_warning  # type: ignore[assignment]  # it takes fewer arguments
    try:
        command = typer.main.get_command(app)
        status = command.main(
            list(arguments) if arguments is not None else None, "medusa-ext", standalone_mode=False
        )
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _report(error)


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"medusa-ext: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _help_for(context: Any, *, follows_sentence: bool) -> str:  # noqa: ANN401 - click's context
    """Return what to do after a usage error: the commands there are, and where options stand."""
    group = getattr(context.command, "commands", None)
    see = f"see {context.command_path} --help"
    if not follows_sentence:
        return f"; {see}"
    return f" Commands are {', '.join(group)}; {see}" if group else f" {see.capitalize()}"


def _report(error: Exception) -> int:
    """Print one line and return the status: 2 for the user's mistakes."""
    usage = getattr(error, "format_message", None)  # typer's own errors, whichever click it carries
    message = usage() if usage is not None else str(error)
    line = " ".join(message.split()) or type(error).__name__
    context = getattr(error, "ctx", None)
    if context is not None:
        line += _help_for(context, follows_sentence=line.endswith((".", "?")))
    print(f"medusa-ext: error: {line}", file=sys.stderr)
    bad_input = usage is not None or isinstance(
        error, ValueError | NotImplementedError | OSError | ImportError
    )
    return 2 if bad_input else 1
