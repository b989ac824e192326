"""What the command line shows: nothing is cut, nothing that others wrote acts on the terminal, JSON stays JSON."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from threading import Thread
from typing import NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as some

from coriolis_azure import errors, events
from coriolis_azure.azure import codes
from coriolis_azure.cli import output, progress
from coriolis_azure.clock import Clock
from coriolis_azure.model import Worker
from coriolis_azure.readers import keys, ssh
from coriolis_azure.sandbox import Sandbox
from coriolis_azure.source import Source
from harness.dying import FOR_GOOD
from harness.error_tree import tree
from harness.processes import Forked, command, completed
from harness.terminals import shown, text

VM = "/subscriptions/5ffe7cd1-0000-4000-8000-000000000000/resourceGroups/group/providers/Microsoft.Compute/disks/"
NAMES = [f"a-name-as-long-as-azure-lets-it-be-{'x' * 36}-{number}" for number in (1, 2)]
EVIL = "[/x] [bold]b[/] \x1b]0;title\x07 \x1b[2J \x9b31m \u202egnp.exe \u2066 \u200b \udcff \r\n→ forged"
SAFE = r"[/x] [bold]b[/] \x1b]0;title\x07 \x1b[2J \x9b31m \u202egnp.exe \u2066 \u200b \udcff \r\n→ forged"


# Tables


def table() -> None:
    output.Table(
        ("run", "name", "resource", "what to do"),
        [(str(row), name, VM + name, f"Look at {name}, then do it again.") for row, name in enumerate(NAMES)],
        "Resources",
    ).show()
    sys.stdout.flush()


@pytest.mark.parametrize("width", [40, 80, 200, 400])
def test_a_table_on_a_terminal_of_any_width_shows_all_in_pieces_that_can_be_copied(width: int) -> None:
    said = text(shown(table, width=width))
    for name in NAMES:
        assert VM + name in said
    assert (" ─" in said) == (width == 400)  # a table where there is room, else a block for each record


@pytest.mark.parametrize("variables", [{}, {"COLUMNS": "20"}, {"FORCE_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_table_in_a_pipe_has_one_line_for_each_record(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with Forked(table) as process:
        lines = text(process.communicate(30)[0]).splitlines()
    assert [line.split()[:3] for line in lines[-2:]] == [
        ["0", NAMES[0], VM + NAMES[0]],
        ["1", NAMES[1], VM + NAMES[1]],
    ]
    assert lines[-1].endswith(f"Look at {NAMES[1]}, then do it again.")


def prose() -> None:
    output.Table(("step", "result"), [("image", "word " * 60)]).show()
    sys.stdout.flush()


def test_prose_is_wrapped_between_words_where_a_terminal_is_wide_enough_to_read_it() -> None:
    said = text(shown(prose, width=60))
    assert said.count("word") == 60
    assert max(map(len, said.splitlines())) <= 60


def test_an_error_is_shown_on_a_terminal_that_says_it_has_no_width() -> None:
    said = text(shown(command, ["explain", "nope"], variables={"COLUMNS": "0"}))
    assert said.startswith("error: ")
    for words in (said, text(shown(watch, variables={"COLUMNS": "0"}))):
        assert "Traceback" not in words


def estimates() -> None:
    output.Table(("what", "estimate"), [("makes", "coriolis-RUN-worker, " * 9), ("costs", "-")]).show()
    sys.stdout.flush()


def test_estimates_stay_a_table_on_a_usual_terminal_and_a_block_leaves_out_what_is_nothing() -> None:
    assert " ─" in text(shown(estimates, width=80))
    blocks = text(shown(estimates, width=30))
    assert (" ─" in blocks, blocks.count("what "), blocks.count("estimate ")) == (False, 2, 1)


# The words of others


@given(some.text())
def test_cleaned_text_is_one_line_that_only_shows(words: str) -> None:
    shown_ = errors.cleaned(words)
    assert all(letter.isprintable() or letter in "\xa0\u3000" or letter.isspace() for letter in shown_)
    assert len(shown_.splitlines()) <= 1


@pytest.mark.parametrize("kind", tree(errors.CoriolisAzureError))
def test_an_error_holds_the_words_of_others_cleaned(kind: type[errors.CoriolisAzureError]) -> None:
    error = kind(f"it said {EVIL}", remedy=f"Ask {EVIL}.")
    assert error.message == str(error) == f"it said {SAFE}"
    assert error.remedy == f"Ask {SAFE}."
    assert kind(["one", "two"]).message == "one\ntwo"


def evil_events() -> list[events.Event]:
    copied = events.Copied(EVIL, done=50, total=100, sent=10)
    return [events.Step("inspect", EVIL), events.Waiting(EVIL, 5), events.Notice(EVIL), copied]


def watch() -> None:
    with progress.watching(as_json=False) as report:
        for event in evil_events():
            report(event)


def hostile(said: str) -> list[str]:
    return [
        bad for bad in ("\x1b]0;", "\x07", "\x9b", "\u202e", "\u2066", "\u200b", "\n→ forged") if bad in said
    ]


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_events_on_a_terminal_are_no_markup_and_no_escape_sequences(term: str) -> None:
    said = shown(watch, variables={"TERM": term}, width=400)
    assert hostile(said) == []
    assert text(said).count(SAFE) >= 3


def test_events_in_a_pipe_are_no_escape_sequences_and_in_json_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Forked(watch) as process:
        said = process.communicate(30)[1]
    assert hostile(said) == []
    assert said.count(SAFE) >= 3


def test_logged_events_are_cleaned(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        for event in evil_events():
            events.logged(event)
    assert [hostile(message) for message in caplog.messages] == [[]] * 4


def evil_table() -> None:
    output.Table(("name", "reason"), [(EVIL, EVIL)], EVIL).show()
    sys.stdout.flush()


def test_tables_hold_no_markup_and_no_escape_sequences() -> None:
    for said in (shown(evil_table, width=40), shown(evil_table, width=300)):
        assert hostile(said) == []
        assert SAFE.split()[1] in said
    with Forked(evil_table) as process:
        assert process.communicate(30)[0].count(SAFE) == 3


def worker_at(port: int) -> Worker:
    return Worker(
        vm="/vm",
        address="127.0.0.1",
        port=port,
        username="us",
        host_key=keys.host_key()[1],
        slots=1,
        private_key=keys.client_key()[0],
    )


def test_an_ssh_server_that_answers_with_escape_sequences_is_told_of_in_plain_words() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with suppress(OSError):
                accepted, _ = server.accept()
                with accepted:
                    accepted.sendall(b"SSH-\x1b[2J[/x]\x07-x\r\n")

        Thread(target=answer, daemon=True).start()
        with pytest.raises(errors.CoriolisAzureError) as error:
            ssh.connect(worker_at(server.getsockname()[1]), Clock(), events.silent, patience=0)
    assert "[/x]" in error.value.message
    assert hostile(error.value.message) == []


def test_a_message_of_azure_s_is_shown_and_acts_on_nothing(
    azure: Sandbox, source: Source, image: Callable[..., Path]
) -> None:
    azure.add_vm("web", image("os"))
    azure.faults.add(
        "refuse", path="/virtualMachines/", status=409, code="Foo", message=EVIL.replace("\udcff", "")
    )
    with pytest.raises(errors.Conflict) as error:
        source.inspect("web")
    assert r"Foo: [/x] [bold]b[/] \x1b]0;title\x07" in error.value.message
    assert hostile(error.value.message) == []


# The streams


def command_with(closed: list[int], line: list[str]) -> None:
    """The command line, started by somebody who has closed some of its streams."""
    for number in closed:
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)
    command(line)


@pytest.mark.parametrize("closed", [[2], [1], [0, 1, 2]])
def test_a_command_works_with_closed_streams_and_no_file_gets_their_numbers(
    closed: list[int], tmp_path: Path
) -> None:
    role = tmp_path / "role.json"
    with Forked(command_with, closed, ["explain", "QuotaExceeded"]) as process:
        out, _ = process.communicate(30)
        assert process.wait(0) == 0
    assert ("Choose a smaller" in out) == (1 not in closed)
    with Forked(opened_number, closed, str(role)) as process:
        process.communicate(30)
        assert process.wait(0) == 0


def opened_number(closed: list[int], path: str) -> None:
    from coriolis_azure.cli.streams import ready_streams

    for number in closed:
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)
    ready_streams()
    with Path(path).open("w") as file:
        assert file.fileno() > 2
    print("told", file=sys.stderr)


def full(number: int, line: list[str]) -> None:
    with Path("/dev/full").open("w") as device:
        os.dup2(device.fileno(), number)
    command(line)


def test_a_result_that_cannot_be_written_is_an_error_and_messages_that_cannot_are_none() -> None:
    with Forked(full, 1, ["explain"]) as process:
        said = process.communicate(30)[1]
        assert process.wait(0) == errors.OutputLost.exit_code
    assert "its result could not be written to standard output: No space left on device" in said
    assert "Traceback" not in said
    with Forked(full, 1, ["check", "-c", "/no/such/file", "-e", "/no/such/file"]) as process:
        assert "could not be written" not in process.communicate(30)[1]  # nothing was to be
        assert process.wait(0) == errors.InvalidInput.exit_code
    with Forked(full, 2, ["explain", "nonsense"]) as process:
        assert process.communicate(30) == ("", "")
        assert process.wait(0) == errors.InvalidInput.exit_code


def test_a_reader_who_leaves_is_no_error() -> None:
    with Forked(command, ["explain"]) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(30) == 0


def test_what_an_encoding_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = subprocess.run(
        [sys.executable, "-m", "coriolis_azure", "explain", "é"], capture_output=True, check=False
    )
    assert done.returncode == errors.InvalidInput.exit_code
    assert rb"'\xe9' is not a known error code" in done.stderr


@pytest.mark.parametrize("line", [["--help"], ["explain", "nonsense", "--json"], ["explain", "é"]])
def test_a_reader_who_leaves_an_ascii_stream_is_no_error_either(
    line: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "coriolis_azure", *line], stdout=writer, stderr=writer)
    os.close(writer)
    assert done.returncode == (0 if line == ["--help"] else errors.InvalidInput.exit_code)


def test_help_is_ascii_where_nothing_else_can_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = subprocess.run([sys.executable, "-m", "coriolis_azure", "--help"], capture_output=True, check=True)
    assert done.stdout.isascii()


# JSON


@pytest.mark.parametrize(
    "line",
    [
        ["explain", "nonsense"],
        ["explain", "--bogus"],
        ["nonsense"],
        ["replicate"],
        ["list", "-c", "/no/such/file"],
    ],
)
def test_errors_are_json_where_json_is_asked_for(line: list[str]) -> None:
    done = completed([*line, "--json"])
    (error,) = [json.loads(said) for said in done.stderr.splitlines()]
    assert (error["event"], error["exit_code"], done.returncode) == ("error", 2, 2)
    assert error["remedy"]
    assert datetime.fromisoformat(error["time"].replace("Z", "+00:00")).tzinfo is not None
    assert done.stdout == ""


def broken(line: list[str]) -> None:
    def bug(code: str) -> NoReturn:
        raise KeyError(f"{code}{EVIL}")

    FOR_GOOD.setattr(codes, "find", bug)
    command(line)


def test_a_bug_is_told_with_its_trace_and_acts_on_no_terminal() -> None:
    with Forked(broken, ["explain", "x"]) as process:
        said = process.communicate(30)[1]
        assert process.wait(0) == 1
    assert "Traceback" in said
    assert "Report this as a fault of coriolis-azure" in said
    assert hostile(said) == []
    with Forked(broken, ["explain", "x", "--json"]) as process:
        (error,) = [json.loads(line) for line in process.communicate(30)[1].splitlines()]
        assert process.wait(0) == 1
    assert error["error"] == "CoriolisAzureError"
    assert error["traceback"][0] == "Traceback (most recent call last):"


def warned(line: list[str]) -> None:
    found = codes.find

    def warning(code: str) -> codes.Code | None:
        logging.getLogger("coriolis_azure.x").warning("said %s", EVIL)
        return found(code)

    FOR_GOOD.setattr(codes, "find", warning)
    command(line)


def test_the_log_is_json_where_json_is_asked_for_and_clean_elsewhere() -> None:
    with Forked(warned, ["explain", "QuotaExceeded", "--json"]) as process:
        (record,) = [json.loads(line) for line in process.communicate(30)[1].splitlines()]
    assert (record["event"], record["level"], record["message"]) == ("log", "warning", f"said {EVIL}")
    with Forked(warned, ["explain", "QuotaExceeded"]) as process:
        said = process.communicate(30)[1]
    assert hostile(said) == []
    assert "WARNING coriolis_azure.x: said [/x]" in said
