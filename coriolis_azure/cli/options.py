"""What commands share: their options, and a Source made from the settings files."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from .. import settings
from ..clock import Clock
from ..errors import InvalidInput
from ..events import Notice, Report
from . import logs
from .progress import watching

F = TypeVar("F", bound=Callable[..., Any])


def json_is_asked_for() -> bool:
    """Whether --json was given, even on a command line that is otherwise invalid."""
    return "--json" in sys.argv[1:]


def _verbose_option() -> click.Option:
    """-v, before or after the name of a command; all occurrences count."""

    def count(context: click.Context, option: click.Parameter, occurrences: int) -> None:
        del option
        context.meta[__name__] = context.meta.get(__name__, 0) + occurrences
        logs.start(context.meta[__name__], as_json=json_is_asked_for())

    return click.Option(
        ["-v", "--verbose"],
        count=True,
        expose_value=False,
        callback=count,
        help="Log to stderr; -vv logs debug output, too. Secrets are never logged.",
    )


class Command(click.Command):
    """A command with the option -v."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.params.append(_verbose_option())


class Group(click.Group):
    """A group of commands, all with the option -v."""

    command_class = Command
    group_class = type

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.params.append(_verbose_option())


# Where Azure lets a custom role be assigned: not at a single resource.
_SCOPE = re.compile(
    r"/subscriptions/[\w-]+(/resourceGroups/[\w().-]*[\w()-])?|/providers/Microsoft\.Management/managementGroups/[\w().-]+",
    re.IGNORECASE,
)


def rate(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """Validate an option that is a rate; a click callback."""
    del context
    if value is not None:
        try:
            settings.rate(value)
        except InvalidInput as error:
            raise InvalidInput(f"{option.opts[0]}: {error.message}", remedy=error.remedy) from error
    return value


def tags(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Validate an option that is a tag, KEY=VALUE; a click callback."""
    del context
    found: dict[str, str] = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not key or not equals:
            raise InvalidInput(
                f"{option.opts[0]}: {value!r} is not a tag with its value", remedy="Write it as KEY=VALUE."
            )
        if found.setdefault(key, text) != text:
            raise InvalidInput(
                f"{option.opts[0]}: a VM cannot have two values of the tag {key}",
                remedy="Give each tag once; run the command once for each value.",
            )
    return found


def assignable(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Validate an option that says where a role may be assigned; a click callback."""
    del context
    for value in values:
        if not _SCOPE.fullmatch(value):
            raise InvalidInput(
                f"{option.opts[0]}: a role cannot be assignable at {value!r}",
                remedy="Write /subscriptions/ID, /subscriptions/ID/resourceGroups/NAME or "
                "/providers/Microsoft.Management/managementGroups/NAME.",
            )
    return values


def json_option(command: F) -> F:
    """Add --json, which every command has."""
    return click.option(
        "--json", "as_json", is_flag=True, help="One JSON document on stdout; events as JSON lines on stderr."
    )(command)


def state_option(destination: str) -> Callable[[F], F]:
    """Add --state, which becomes part of the URL in the parameter `destination`."""

    def add(command: F) -> F:
        @wraps(command)
        def stated(*args: Any, state: Path | None, **options: Any) -> Any:
            if state is not None:
                from ..replica.nbd_url import with_state

                options[destination] = with_state(options[destination] or "", state)
            return command(*args, **options)

        return click.option(
            "--state",
            type=click.Path(file_okay=False, path_type=Path),
            metavar="DIR",
            help="For nbd://: a folder of this host for digests and what is being fetched. "
            "Name the same one in every run.",
        )(cast(F, stated))

    return add


def source_options(command: F, *, required: bool = True) -> F:
    """Add -c and -e."""
    return _connection(required=required)(_environment(required=required)(command))


def report_option(command: F) -> F:
    """Add --report; see `reporting`."""
    return click.option(
        "--report",
        "report_file",
        type=FILE,
        metavar="FILE",
        help="Write a page about the runs, for a browser, even if they fail: steps, rates, maps of the disks.",
    )(command)


def several_sources_options(command: F) -> F:
    """Add -c and -e, of which the latter may be repeated."""
    return _connection(required=True)(_environment(required=True, multiple=True)(command))


_READ = click.Path(exists=True, dir_okay=False, path_type=Path)
FILE = click.Path(path_type=Path)


def _connection(*, required: bool) -> Callable[[F], F]:
    return click.option(
        "-c",
        "--connection",
        type=_READ,
        required=required,
        envvar="CORIOLIS_AZURE_CONNECTION",
        show_envvar=True,
        help="JSON file: which Azure to use, and as whom to sign in. Keep it private.",
    )


def _environment(*, required: bool, multiple: bool = False) -> Callable[[F], F]:
    more = " May be repeated, for VMs in several places." if multiple else ""
    return click.option(
        "-e",
        "--environment",
        "environments" if multiple else "environment",
        type=_READ,
        required=required,
        multiple=multiple,
        envvar="CORIOLIS_AZURE_ENVIRONMENT",
        show_envvar=True,
        help=f"JSON file: where the VMs are, and how to make the worker.{more}",
    )


@contextlib.contextmanager
def at_places(
    connection: Path | None, environment: Path | None, *urls: str, as_json: bool
) -> Iterator[tuple[Report, Clock, Any]]:
    """What opens destinations: a report, a clock and, for destinations in Azure, the storage of the settings."""
    from ..replica import places

    if connection and environment and any(map(places.is_in_azure, urls)):
        with opened(connection, environment, as_json=as_json) as source:
            yield source.context.report, source.context.clock, source.storage
    else:
        with watching(as_json=as_json) as report:
            yield report, Clock(), None


@contextlib.contextmanager
def opened(connection: Path, environment: Path, *, as_json: bool, **changes: str | None) -> Iterator[Any]:
    """A Source from the two files, with its progress shown; `changes` but None replace settings of the environment."""
    from ..source import Source  # the SDKs take a second to import: not for --help

    connection_info = settings.read_json(connection)
    source_environment = settings.changed(settings.read_json(environment), changes)
    with watching(as_json=as_json) as report:
        for warning in settings.exposed(connection, connection_info):
            report(Notice(warning))
        with Source(connection_info, source_environment, report=report) as source:
            yield source
