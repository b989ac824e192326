"""What is touched of paramiko's insides is there, and used, in the paramiko that is installed.

`tox -e lowest` runs this with the lowest version that is allowed, the other environments with the newest.
"""

from __future__ import annotations

import ast
import inspect
import socket
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import paramiko
import paramiko.channel
import paramiko.packet
import pytest
from paramiko.buffered_pipe import BufferedPipe

from coriolis_azure.readers import paramiko_internals
from coriolis_azure.readers.paramiko_internals import Arrived

READERS = Path(paramiko_internals.__file__).parent
# Methods of a channel that ask more of its buffers, and that nobody here calls.
UNUSED = {"fileno", "set_combine_stderr"}


def attributes(module: ModuleType) -> list[tuple[str, ast.Attribute]]:
    """The attributes that the functions of a module name, each with its function."""
    return [
        (function.name, node)
        for function in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute)
    ]


@pytest.fixture
def channel() -> paramiko.Channel:
    return paramiko.Channel(1)


def test_the_version_is_one_of_those_that_are_allowed() -> None:
    major = int(metadata.version("paramiko").partition(".")[0])
    (asked,) = (each for each in metadata.requires("coriolis-azure") or () if each.startswith("paramiko"))
    assert {f">={major}.0", f"<{major + 1}"} == set(asked.removeprefix("paramiko").split(","))


@pytest.mark.parametrize("name", ["in_buffer", "in_stderr_buffer"])
def test_the_buffers_of_a_channel_have_all_that_it_uses(channel: paramiko.Channel, name: str) -> None:
    assert isinstance(getattr(channel, name), BufferedPipe)
    used = {
        node.attr
        for function, node in attributes(paramiko.channel)
        if isinstance(node.value, ast.Attribute) and node.value.attr == name and function not in UNUSED
    }
    assert used >= {"read", "feed", "close", "read_ready"}
    assert used - set(dir(Arrived)) == set()
    for method in used:
        theirs, ours = (inspect.signature(getattr(kind, method)) for kind in (BufferedPipe, Arrived))
        assert len(theirs.parameters) == len(ours.parameters), method


def test_nobody_here_calls_what_asks_more_of_them() -> None:
    texts = "".join(path.read_text() for path in READERS.glob("*.py"))
    assert not [name for name in UNUSED if f"channel.{name}(" in texts]


def test_the_buffers_are_replaced_before_anything_comes(channel: paramiko.Channel) -> None:
    paramiko_internals.receive_into_blocks(channel, 100)
    assert not channel.recv_ready()
    channel.in_buffer.feed(b"came")
    assert channel.recv_ready()
    assert bytes(channel.recv(9)) == b"came"


def test_keys_are_replaced_after_as_many_bytes_as_the_packetizer_is_told() -> None:
    assert isinstance(paramiko.packet.Packetizer.REKEY_BYTES, int)
    assert "REKEY_BYTES" in {node.attr for _, node in attributes(paramiko.packet)}
    one, other = socket.socketpair()
    with one, other:
        transport = paramiko.Transport(one)
        paramiko_internals.agree_on_new_keys_after(transport, 5)
        assert transport.packetizer.REKEY_BYTES == 5
        assert paramiko_internals.usual_window(transport) > 1 << 20


def test_packets_and_greetings_are_read_by_what_is_bounded() -> None:
    used = {node.attr for function, node in attributes(paramiko.packet) if function == "read_message"}
    assert "read_all" in used
    assert "_read_timeout" in {node.attr for name, node in attributes(paramiko.packet) if name == "readline"}


def test_a_status_is_waited_for_by_an_event_that_the_status_sets(channel: Any) -> None:
    assert paramiko_internals.wait_for_status(channel, 0) is False
    message = paramiko.Message()
    message.add_string("exit-status")
    message.add_boolean(False)
    message.add_int(3)
    message.rewind()
    one, other = socket.socketpair()
    with one, other:
        channel._set_transport(paramiko.Transport(one))
        channel._handle_request(message)
    assert paramiko_internals.wait_for_status(channel, 0) is True
    assert channel.recv_exit_status() == 3


def test_nothing_else_of_the_insides_is_touched() -> None:
    """Names that begin with an underscore, and attributes that paramiko's pages do not tell of."""
    undocumented = {"in_buffer", "in_stderr_buffer", "status_event", "packetizer", "default_window_size"}
    for path in READERS.glob("*.py"):
        if path.stem == "paramiko_internals":
            continue
        named = {
            node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
        }
        assert named & undocumented == set(), path.name
