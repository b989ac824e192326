"""The way of the orchestrator's own engine, emulated: for comparison with ours, by transfers.py.

    python engine.py serve FOLDER IMAGE      the worker's side
    python engine.py fetch JSON              the orchestrator's side: one run; prints JSON

Each time the worker's side hashes the whole disk with SHA-256 in chunks of 10 MiB, in one thread; then the
orchestrator fetches the chunks that differ (the first time those that are not zeros), one at a time, with HTTPS
range requests over one session. It is kind to the original where that cannot be seen: AES-128, no gzip, and none of
the seconds in which the original waits between its questions for the state.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import ssl
import sys
import threading
import time
from pathlib import Path
from typing import Any

import requests

from coriolis_azure.agent import tls

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

CHUNK = 10 << 20


def hashes(image: Path) -> list[str]:
    """The SHA-256 of each chunk."""
    found = []
    room = bytearray(CHUNK)
    with image.open("rb", buffering=0) as file:
        while done := file.readinto(room):
            found.append(hashlib.sha256(memoryview(room)[:done]).hexdigest())
    return found


def serve(folder: Path, image: Path) -> None:
    """Answer until stdin ends; the port, and what a client needs, is printed as JSON."""
    from harness import writer_targets

    writer_targets.certificates(folder)
    fd = os.open(image, os.O_RDONLY)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path == "/chunks":
                self._answer(json.dumps(hashes(image)).encode())
            else:
                first, last = self.headers["Range"].removeprefix("bytes=").split("-")
                self._answer(os.pread(fd, int(last) + 1 - int(first), int(first)))

        def _answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # up to which Python lets us choose the faster AES-128
    context.set_ciphers(tls.CIPHERS)
    context.load_cert_chain(folder / "server_crt", folder / "server_key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(json.dumps({"port": server.server_address[1], "ca": str(folder / "ca_crt")}), flush=True)
    sys.stdin.read()


def fetch(task: dict[str, Any]) -> None:
    """Bring `target` up to the worker's disk; `had`: a file with the hashes of what it holds, or null."""
    had = json.loads(Path(task["had"]).read_text()) if task["had"] else None
    began = time.perf_counter()
    base = f"https://127.0.0.1:{task['port']}"
    fd = os.open(task["target"], os.O_RDWR | os.O_CREAT, 0o600)
    os.truncate(fd, task["size"])
    zeros = hashlib.sha256(bytes(CHUNK)).hexdigest()
    sent = 0
    with requests.Session() as session:
        session.trust_env = False
        session.verify = task["ca"]
        session.headers["Accept-Encoding"] = "identity"
        for index, found in enumerate(session.get(f"{base}/chunks", timeout=600).json()):
            if found == (had[index] if had else zeros):
                continue
            first, last = index * CHUNK, min(task["size"], (index + 1) * CHUNK) - 1
            answer = session.get(f"{base}/disk", headers={"Range": f"bytes={first}-{last}"}, timeout=600)
            answer.raise_for_status()
            data = memoryview(answer.content)
            sent += len(data)
            while data:
                done = os.pwrite(fd, data, first)
                first, data = first + done, data[done:]
    os.close(fd)
    print(json.dumps({"seconds": time.perf_counter() - began, "sent": sent}))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        fetch(json.loads(sys.argv[2]))
