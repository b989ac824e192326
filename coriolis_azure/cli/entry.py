"""Where the command line begins and ends: signals, and errors as words and exit codes."""

from __future__ import annotations

import json
import signal
import sys
from types import FrameType

import click

from ..errors import AzureError, CoriolisAzureError
from . import sandbox  # noqa: F401 - its commands belong to the group
from .commands import cli
from .output import ERR, plain

INTERRUPTED = 130


class Terminated(KeyboardInterrupt):
    """The process was asked to end; handled like Ctrl-C, so that what was made is undone."""


def main() -> int:
    """Run the command line; the exit code."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, _terminate)
    as_json = "--json" in sys.argv
    try:
        # What a command's Exit carries comes back as the result; a command itself has none.
        return cli.main(prog_name="coriolis-azure", standalone_mode=False) or 0
    except CoriolisAzureError as error:
        _tell_error(error, as_json)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        ERR.print("interrupted")
        return INTERRUPTED


def _terminate(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise Terminated


def _tell_error(error: CoriolisAzureError, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"event": "error", **error.to_json()}, default=str), err=True)
    else:
        ERR.print(f"[bold red]error:[/] {plain(error.message)}", highlight=False, soft_wrap=True)
        ERR.print(f"[bold]what to do:[/] {plain(error.remedy)}", highlight=False, soft_wrap=True)
        if isinstance(error, AzureError) and error.reference:
            ERR.print(f"[dim]Azure's answer: {plain(error.reference)}[/]", highlight=False, soft_wrap=True)
