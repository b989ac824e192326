"""The other ends of the backup writers' protocols, for tests and benchmarks: real servers on the loopback.

`SshTarget` is a guest of the sandbox (an SSH server in a process of its own) whose login directory can be given
a `write_data`. `HttpsTarget` is a server of the HTTPS writer's protocol, with certificates of its own; run as a
program, this file serves one until stdin ends.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import ipaddress
import json
import os
import random
import socket
import ssl
import subprocess
import sys
import threading
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from coriolis_azure import tls
from coriolis_azure.readers import keys
from coriolis_azure.sandbox.guest import guest

SSH_PORT = 2022


class SshTarget:
    """A host that takes commands by SSH, `sessions` at a time on a connection; `home` is its login directory."""

    def __init__(self, folder: Path, address: str = "", sessions: int = 10) -> None:
        self.private, public = keys.client_key()
        parts = (random.randrange(64, 250), random.randrange(1, 250), random.randrange(1, 250))
        self.address = address or "127.{}.{}.{}".format(*parts)
        self.home = folder / "home" / "user"
        (folder / "bin").mkdir(parents=True)
        (folder / "dev").mkdir()
        (folder / "rules.json").write_text("[]")
        lines = f"Port {SSH_PORT}\nMaxSessions {sessions}\n"
        sshd = {"path": "/etc/ssh/sshd_config.d/own.conf", "content": lines}
        told = {
            "user": "user",
            "keys": [public],
            "address": self.address,
            "python": sys.executable,
            "namespaces": False,
            "cloud_config": {"write_files": [sshd]},
        }
        (folder / "guest.json").write_text(json.dumps(told))
        self._process = subprocess.Popen(
            [sys.executable, guest.__file__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        assert json.loads(self._stdout.readline()).get("ready")
        self.synced = folder / "synced"
        self.program("sync", f"#!/bin/sh\necho >> {self.synced}\n", folder / "bin")

    def program(self, name: str, text: str, folder: Path | None = None) -> None:
        """Put a program there: into the login directory if nothing else is said."""
        path = (folder or self.home) / name
        path.write_text(text)
        path.chmod(0o755)

    @property
    def info(self) -> dict[str, Any]:
        """What the orchestrator says of it."""
        details = {"ip": self.address, "port": SSH_PORT, "username": "user", "pkey": self.private}
        return {"backend": "ssh_backup_writer", "connection_details": details}

    def kill(self) -> None:
        """End it as a power cut would."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Shut it down."""
        self._stdin.close()
        self._process.wait()
        self._stdout.close()


def certificates(folder: Path) -> dict[str, str]:
    """An authority, and a server's and a client's certificate and key of it: PEM texts; 127.0.0.1 is the server."""
    moment = datetime.now(timezone.utc)
    authority = ec.generate_private_key(ec.SECP256R1())

    def made(name: str, key: ec.EllipticCurvePrivateKey) -> str:
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ca")])
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(moment - timedelta(days=1))
            .not_valid_after(moment + timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=name == "ca", path_length=None), critical=True)
            .add_extension(names, critical=False)
        )
        return builder.sign(authority, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()

    def text(key: ec.EllipticCurvePrivateKey) -> str:
        return key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode()

    pems = {"ca_crt": made("ca", authority)}
    for name in ("server", "client"):
        key = ec.generate_private_key(ec.SECP256R1())
        pems[f"{name}_crt"], pems[f"{name}_key"] = made(name, key), text(key)
    folder.mkdir(parents=True, exist_ok=True)
    for name, pem in pems.items():
        (folder / name).write_text(pem)
    return pems


class HttpsTarget(ThreadingHTTPServer):
    """A server of the HTTPS writer's protocol.

    `faults`: statuses that the next chunks are answered with instead of being taken; 0 breaks the connection.
    `stalled`: while it is set, chunks are not answered. `checksums`: "finished", "failed" or "" (no such thing).
    """

    request_queue_size = 128  # with five, some of many connections at a time come after a second only
    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: Path) -> None:
        self.pems = certificates(folder)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.sslsocket_class = tls.Socket
        (folder / "both").write_text(self.pems["server_crt"] + self.pems["server_key"])
        context.load_cert_chain(folder / "both")
        context.load_verify_locations(folder / "ca_crt")
        context.verify_mode = ssl.CERT_REQUIRED
        self.context = context
        self.holder: dict[str, str] = {}
        self.jobs: dict[str, tuple[str, int, int]] = {}
        self.made_jobs = 0
        self.posts = 0
        self.faults: list[int] = []
        self.checksums = "finished"
        self.flowing = threading.Event()
        self.flowing.set()
        self.waiting = threading.Semaphore(0)
        self.connections: set[socket.socket] = set()
        self.killed = False
        super().__init__(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @property
    def info(self) -> dict[str, Any]:
        """What the orchestrator says of it."""
        certificates = {name: self.pems[name] for name in ("client_crt", "client_key", "ca_crt")}
        details = {"ip": "127.0.0.1", "port": self.server_port, "certificates": certificates}
        return {"backend": "http_backup_writer", "connection_details": details}

    def kill(self) -> None:
        """End it as a power cut would."""
        self.killed = True
        self.shutdown()
        self._thread.join()
        self.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    close = kill

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are no news."""

    def finish_request(self, request: Any, client_address: Any) -> None:
        with self.context.wrap_socket(request, server_side=True) as secured:
            self.connections.add(secured)
            try:
                if not self.killed:
                    super().finish_request(secured, client_address)
            finally:
                self.connections.discard(secured)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: HttpsTarget

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, status: int, document: object = b"") -> None:
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def parts(self) -> tuple[str, str]:
        """Device, and what is asked of it. A device's base64 may hold slashes."""
        whole = self.path.removeprefix("/api/v2/device/")
        for verb in ("/acquire", "/release", "/checksumJob"):
            head, found, rest = whole.partition(verb)
            if found:
                return base64.b64decode(head, validate=True).decode(), found[1:] + rest
        return base64.b64decode(whole, validate=True).decode(), ""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        device, verb = self.parts()
        token = self.headers["X-Client-Token"]
        held = self.server.holder.get(device)
        if verb == "acquire":
            if held not in (None, token):
                self.answer(409, {"error": "in use by another client"})
                return
            self.server.holder[device] = token
            self.answer(200)
        elif held != token or not token:
            self.answer(403, {"error": "not yours"})
        elif verb == "release":
            del self.server.holder[device]
            self.answer(200)
        elif verb == "checksumJob":
            self.job(device, json.loads(body))
        else:
            self.chunk(device, body)

    def chunk(self, device: str, body: bytes) -> None:
        self.server.posts += 1
        self.server.waiting.release()
        self.server.flowing.wait()
        if self.server.faults:
            status = self.server.faults.pop(0)
            if status:
                self.answer(status, {"error": "out of luck"})
            else:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            return
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        offset = int(self.headers["X-Write-Offset"])
        fd = os.open(device, os.O_WRONLY)
        try:
            if offset + len(body) > os.lseek(fd, 0, os.SEEK_END):
                self.answer(400, {"error": "beyond the end"})
                return
            os.pwrite(fd, body, offset)
        finally:
            os.close(fd)
        self.answer(200)

    def job(self, device: str, task: dict[str, Any]) -> None:
        if not self.server.checksums:
            self.answer(404, {"error": "no such endpoint"})
            return
        if self.server.checksums == "nested":
            self.answer(200, b"[" * 100_000)
            return
        assert task["checksum_algorithm"] == "sha256"
        id = str(random.getrandbits(64))
        self.server.made_jobs += 1
        self.server.jobs[id] = device, task["start_offset"], task["end_offset"]
        self.answer(200, {"job_id": id})

    def do_GET(self) -> None:
        _, verb = self.parts()
        device, start, end = self.server.jobs[verb.rpartition("/")[2]]
        if self.server.checksums == "failed":
            self.answer(200, {"execution_status": "failed", "error_message": "the medium is bad"})
            return
        with Path(device).open("rb") as file:
            file.seek(start)
            data = file.read(end - start) if end else file.read()
        value = hashlib.sha256(data).hexdigest()
        document = {"checksum_algorithm": "sha256", "checksum_value": value, "error_message": ""}
        self.answer(200, {"execution_status": "finished", **document})

    def do_DELETE(self) -> None:
        _, verb = self.parts()
        del self.server.jobs[verb.rpartition("/")[2]]
        self.answer(204)


if __name__ == "__main__":
    with contextlib.closing(HttpsTarget(Path(sys.argv[1]))) as target:
        print(json.dumps(target.info), flush=True)
        sys.stdin.read()
