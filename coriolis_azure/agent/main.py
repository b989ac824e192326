"""Where the agent begins: it serves one disk, then ends.

When stdin ends the host is gone, and so is the agent, whatever it was doing.
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
    """The job of the host."""
    kind, _, _, _, length, _ = HEAD.unpack(read_exactly(fd, HEAD.size))
    if kind != JOB or length > MAX_JSON:
        raise Failure("the host did not begin with a job")
    return json.loads(read_exactly(fd, length).decode())


def chosen(job: Any) -> str:
    """The hash for a job. Failure where there is none."""
    names = list(filter(usable, job["hashes"]))
    if not names:
        raise Failure("no hash {} in Python {}".format(", ".join(job["hashes"]), sys.version.split()[0]))
    return fastest(names) if job["choose"] else names[0]


def listener(offer: Any) -> Tuple[Any, str]:
    """The listener for the direct channel that the job offers; or why there is none."""
    if not offer:
        return None, "not wanted"
    address = sys.argv[1] if len(sys.argv) > 1 else ""
    if not address:
        return None, "the SSH server did not tell the address of the connection"
    try:
        return Listener(address, offer), ""
    except (OSError, ValueError) as error:
        return None, "cannot listen at {} port {}: {}".format(address, offer["port"], error)


def main() -> None:
    """Serve one disk, then end the process.

    The job: {"device_candidates": paths, "size", "chunk", "first": chunk, "leaf": bytes or 0, "hashes": names, of
    which the first usable one is taken, or with "choose" the fastest, "key": hex, "compress": "none", "auto" or
    "always", "packings": names that the host knows besides zlib, "wait": seconds for a device to appear, "direct":
    null or {"port", "certificate", "key", "peer"}}.
    """
    out = Output(pipe_writer(1))
    try:
        with contextlib.suppress(OSError):  # only a wish; F_SETPIPE_SZ: fewer switches
            fcntl.fcntl(1, 1031, 1 << 20)
        job = receive(0)
        heard = Input(0, job["first"])
        name = chosen(job)
        scan = Scan(job, name, heard, out)
        direct, why = listener(job["direct"])
        scan.fd, scan.device = open_device(job["device_candidates"], job["size"], job["wait"])
        ready = {"device": scan.device, "size": scan.size, "hash": name, "why": why}
        port = job["direct"]["port"] if direct else 0
        out.send_json(READY, dict(ready, port=port, python=sys.version.split()[0]))
        if heard.go() and direct:
            out.write = direct.host().write
        elif direct:
            direct.close()
        scan.run()
    except (EOFError, BrokenPipeError, ConnectionError):
        os._exit(0)
    except Exception as error:  # noqa: BLE001  (the end of the program: the host must hear of it)
        name = type(error).__name__
        # The text of a fault of ours stays here: it might hold content of the disk.
        message = str(error) if isinstance(error, Failure) else "fault of the agent: {}".format(name)
        last = {"error": name, "message": message, "offset": getattr(error, "offset", None)}
        with contextlib.suppress(OSError):
            out.send_json(ERROR, last)
        os._exit(1)
    os._exit(0)  # not `return`: a listener is still blocked on stdin
