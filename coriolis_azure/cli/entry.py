"""Where the command line begins and ends: its streams, signals, and errors as words and exit codes."""

from __future__ import annotations

import json
import signal
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
from . import sandbox  # noqa: F401 - its commands belong to the group
from .commands import cli
from .options import json_is_asked_for
from .output import err, show
from .streams import ended_streams, ready_streams

INTERRUPTED = 130


class Terminated(KeyboardInterrupt):
    """The process was asked to end; handled like Ctrl-C, so that what was made is undone."""


def run() -> int:
    """Run the command line; the exit code."""
    ready_streams()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, _terminate)
    try:
        status = _run()
        _ignore_signals()
    except KeyboardInterrupt:  # another signal, while the first one was told of
        _ignore_signals()
        status = INTERRUPTED
    lost = ended_streams()
    if lost is not None:
        text = f"the work is done, but its result could not be written to standard output: {lost.strerror}"
        status = status or _tell(OutputLost(text))
    return status


def _run() -> int:
    try:
        # What a command's Exit carries comes back as the result; a command itself has none.
        return cli.main(prog_name="coriolis-azure", standalone_mode=False) or 0
    except CoriolisAzureError as error:
        return _tell(error)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return error.exit_code
    except click.ClickException as error:
        return _tell(_usage(error))
    except (KeyboardInterrupt, click.Abort):
        _tell_interrupted()
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - a bug: its trace holds words of others, which Python would not clean
        limit = exhausted(error)
        return _tell(limit) if limit else _tell_bug(error)


def _ignore_signals() -> None:
    """Nothing is left to interrupt, and the exit code is known."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _terminate(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise Terminated


def _usage(error: click.ClickException) -> InvalidInput:
    """What click does not understand, as one of our errors."""
    command = (
        error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "coriolis-azure"
    )
    message = " ".join(error.format_message().split())  # click sets choices on lines of their own
    return InvalidInput(message, remedy=f"Run `{command} --help` for what can be given.")


def _tell(error: CoriolisAzureError) -> int:
    """Show an error; its exit code."""
    if json_is_asked_for():
        _tell_json(error.to_json())
        return error.exit_code
    show(err(), error.message, "error: ", "bold red")
    show(err(), error.remedy, "what to do: ", "bold")
    left = error.left_behind
    if left and not isinstance(error, CleanupIncomplete):
        text = f"temporary resources that could not be deleted: {len(left)}. Run `coriolis-azure cleanup`."
        show(err(), text, "left in Azure: ", "bold")
    if isinstance(error, AzureError) and error.reference:
        show(err(), error.reference, "Azure's answer: ", "dim")
    return error.exit_code


def _tell_interrupted() -> None:
    if json_is_asked_for():
        _tell_json({"error": "Interrupted", "message": "interrupted", "exit_code": INTERRUPTED})
    else:
        err().print("interrupted")


def _tell_bug(error: Exception) -> int:
    lines = [cleaned(line) for part in traceback.format_exception(error) for line in part.splitlines()]
    told = CoriolisAzureError(f"{type(error).__name__}: {error}")
    if json_is_asked_for():
        _tell_json({**told.to_json(), "traceback": lines})
        return told.exit_code
    for line in lines:
        err().print(line)
    return _tell(told)


def _tell_json(document: dict[str, Any]) -> None:
    told = {"event": "error", "time": rfc3339(Clock().now()), **document}
    click.echo(json.dumps(told, default=str), err=True)
