"""The entry point of the agent: it serves one disk, then exits.

The end of stdin means that the host is gone; the agent then exits at once, whatever it is doing.
"""

import contextlib
import fcntl
import json
import os
import sys
from typing import Any, Tuple

from .digest import fastest, usable
from .scan import Scan, open_device
from .tls import Listener
from .wire import ERROR, HEAD, JOB, MAX_JSON, READY, Failure, Input, Output, pipe_writer, read_exactly


def receive(fd: int) -> Any:
    """Read the job, the host's first message."""
    kind, _, _, _, length, _ = HEAD.unpack(read_exactly(fd, HEAD.size))
    if kind != JOB or length > MAX_JSON:
        raise Failure("the host's first message is not a job")
    return json.loads(read_exactly(fd, length).decode())


def chosen(job: Any) -> str:
    """The hash to use for a job. Failure if none of those it names is usable."""
    names = list(filter(usable, job["hashes"]))
    if not names:
        raise Failure(
            "Python {} cannot compute {}".format(sys.version.split()[0], " or ".join(job["hashes"]))
        )
    return fastest(names) if job["choose"] else names[0]


def listener(offer: Any) -> Tuple[Any, str]:
    """The listener for the direct channel that the job offers, or None and the reason."""
    if not offer:
        return None, "not wanted"
    address = sys.argv[1] if len(sys.argv) > 1 else ""
    if not address:
        return None, "got no address from the SSH server"
    try:
        return Listener(address, offer), ""
    except (OSError, ValueError) as error:
        return None, "cannot listen at {} port {}: {}".format(address, offer["port"], error)


def main() -> None:
    """Serve one disk, then exit the process.

    The job: {"device_candidates": paths, "size", "chunk", "leaf": bytes or 0, "hashes": names,
    "choose": true to use the fastest of them, false for the first usable one, "key": hex, "compress": "none", "auto"
    or "always", "packings": names that the host knows besides zlib, "wait": seconds for a device to appear,
    "threads": how many read and hash, "direct": null or {"port", "certificate", "key", "peer"}}.
    """
    out = Output(pipe_writer(1))
    try:
        with contextlib.suppress(OSError):  # F_SETPIPE_SZ saves context switches; we can do without
            fcntl.fcntl(1, 1031, 1 << 20)
        job = receive(0)
        incoming = Input(0)
        name = chosen(job)
        scan = Scan(job, name, incoming, out)
        direct, why = listener(job["direct"])
        scan.fd, scan.device = open_device(job["device_candidates"], job["size"], job["wait"])
        ready = {"device": scan.device, "size": scan.size, "hash": name, "why": why}
        port = job["direct"]["port"] if direct else 0
        out.send_json(READY, dict(ready, port=port, python=sys.version.split()[0]))
        connections = incoming.go()
        if connections and direct:
            out.write = direct.host(connections).write
        elif direct:
            direct.close()
        scan.run()
    except (EOFError, BrokenPipeError, ConnectionError):
        os._exit(0)
    except Exception as error:  # noqa: BLE001  (the outermost frame: the host has to learn of any error)
        name = type(error).__name__
        # The text of an unexpected error is not sent: it might contain data from the disk.
        message = str(error) if isinstance(error, Failure) else "fault of the agent: {}".format(name)
        last = {"error": name, "message": message, "offset": getattr(error, "offset", None)}
        with contextlib.suppress(OSError):
            out.send_json(ERROR, last)
        os._exit(1)
    os._exit(0)  # not `return`: the listening thread is still blocked on stdin
