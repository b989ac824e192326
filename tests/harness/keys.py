"""Keys to sign in with that the runs of a process take in turn.

To make one takes a quarter of a second, a third of what all else of a run takes: more than any test waits for.
"""

from __future__ import annotations

import threading

from coriolis_azure.readers import keys

_ENOUGH = 4  # no test has more workers and strangers at a time
_made: list[tuple[str, str]] = []
_lock = threading.Lock()
_fresh = keys.client_key


def client_key() -> tuple[str, str]:
    """A key pair as `ssh.client_key` makes it, and another than the last three times."""
    with _lock:
        _made.append(_made.pop(0) if len(_made) == _ENOUGH else _fresh())
        return _made[-1]


def make() -> None:
    """Make all of them, for the processes that are forked from this one."""
    for _ in range(_ENOUGH):
        client_key()


def take_turns() -> None:
    """From now on, in this process and in those forked from it."""
    keys.client_key = client_key
