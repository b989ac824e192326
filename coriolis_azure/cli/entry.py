"""The entry point of the command line: streams, signals, and errors as messages and exit codes."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from types import FrameType
from typing import Any

import click

from ..clock import Clock, rfc3339
from ..errors import (
    AzureError,
    CleanupIncomplete,
    CoriolisAzureError,
    InvalidInput,
    OutputLost,
    cleaned,
    exhausted,
)
from . import fleet, planning, sandbox  # noqa: F401 - their commands belong to the group
from .commands import cli as cli  # with the commands of all modules
from .options import json_is_asked_for
from .output import show
from .streams import ended_streams, ready_streams

INTERRUPTED = 130
_COMPLETE = "_CORIOLIS_AZURE_COMPLETE"  # set by the completion scripts that click makes


class Terminated(KeyboardInterrupt):
    """The process was asked to end. Handled like Ctrl-C, so that a run cleans up."""


def run() -> int:
    """Run the command line and return its exit code."""
    if _COMPLETE in os.environ:  # click answers a shell in bytes, and exits
        cli.main(prog_name="coriolis-azure")
    ready_streams()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, _terminate)
    try:
        status = _run()
        _ignore_signals()
    except KeyboardInterrupt:  # another signal, while the first one was being reported
        _ignore_signals()
        status = INTERRUPTED
    lost = ended_streams()
    if lost is not None:
        text = (
            f"the command succeeded, but its result could not be written to standard output: {lost.strerror}"
        )
        status = status or _show_error(OutputLost(text))
    return status


def _run() -> int:
    try:
        # click returns the code of a command's Exit; a command that just ends returns None.
        return cli.main(prog_name="coriolis-azure", standalone_mode=False) or 0
    except CoriolisAzureError as error:
        return _show_error(error)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return error.exit_code
    except click.ClickException as error:
        return _show_error(_usage(error))
    except (KeyboardInterrupt, click.Abort):
        _show_interrupted()
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - a bug: its traceback has foreign text, which Python would not clean
        reason = exhausted(error) or _no_folder()
        return _show_error(reason) if reason else _show_bug(error)


def _no_folder() -> InvalidInput | None:
    """The error for the folder that this process is in, if it was deleted: then no relative path leads anywhere."""
    try:
        os.getcwd()  # noqa: PTH109 - Path.cwd() calls it
    except FileNotFoundError:
        return InvalidInput(
            "the current folder was deleted", remedy="Change to another folder, and run the command again."
        )
    return None


def _ignore_signals() -> None:
    """Ignore signals, now that nothing is left to interrupt and the exit code is known."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _terminate(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise Terminated


def _usage(error: click.ClickException) -> InvalidInput:
    """Translate an error of click's to ours."""
    command = (
        error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "coriolis-azure"
    )
    message = " ".join(error.format_message().split())  # click puts choices on separate lines
    return InvalidInput(message, remedy=f"Run `{command} --help` for its arguments and options.")


def _show_error(error: CoriolisAzureError) -> int:
    """Show an error and return its exit code."""
    if json_is_asked_for():
        _show_json(error.to_json())
        return error.exit_code
    show(sys.stderr, error.message, "error: ", "bold red")
    show(sys.stderr, error.remedy, "what to do: ", "bold")
    left = error.left_behind
    if left and not isinstance(error, CleanupIncomplete):
        text = f"temporary resources that could not be deleted: {len(left)}. Run `coriolis-azure cleanup`."
        show(sys.stderr, text, "left in Azure: ", "bold")
    if isinstance(error, AzureError) and error.reference:
        show(sys.stderr, error.reference, "Azure's answer: ", "dim")
    return error.exit_code


def _show_interrupted() -> None:
    if json_is_asked_for():
        _show_json({"error": "Interrupted", "message": "interrupted", "exit_code": INTERRUPTED})
    else:
        click.echo("interrupted", err=True)


def _show_bug(error: Exception) -> int:
    lines = [cleaned(line) for part in traceback.format_exception(error) for line in part.splitlines()]
    bug = CoriolisAzureError(f"{type(error).__name__}: {error}")
    if json_is_asked_for():
        _show_json({**bug.to_json(), "traceback": lines})
        return bug.exit_code
    for line in lines:
        click.echo(line, err=True)
    return _show_error(bug)


def _show_json(document: dict[str, Any]) -> None:
    event = {"event": "error", "time": rfc3339(Clock().now()), **document}
    click.echo(json.dumps(event, default=str), err=True)
