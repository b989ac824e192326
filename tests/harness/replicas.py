"""Places for one disk's replica, one of each kind, behind one face: for tests that every kind must pass."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, cast

from azure.core.credentials import AccessToken, TokenCredential
from azure.core.exceptions import ResourceExistsError, ResourceNotFoundError
from azure.core.pipeline.transport import RequestsTransport
from azure.storage.blob import BlobLeaseClient
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from coriolis_azure.azure.blobs import Blob, Storage
from coriolis_azure.azure.client import Azure
from coriolis_azure.clock import Clock
from coriolis_azure.events import Report, silent
from coriolis_azure.replica import places, sets
from coriolis_azure.replica.container import BlobFolder
from coriolis_azure.replica.destinations import Destination
from coriolis_azure.replica.nbd_medium import NbdMedium
from coriolis_azure.replica.nbd_url import Exports
from coriolis_azure.sandbox import Sandbox
from coriolis_azure.settings import Connection
from harness.clocks import Held
from harness.images import Device, Image

ACCOUNT, KEY = "devstoreaccount1", "c2VjcmV0IG9mIHRoZSB0ZXN0cyBvbmx5LCBvZiA2NCBieXRlcyBvciBzbw=="


class FilePlace:
    """A raw image in a folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "os.raw"

    @contextmanager
    def open(self, report: Report = silent, *, adopt: bool = False) -> Iterator[Destination]:
        """The destination, for one run."""
        with self._image(report, adopt) as image:
            yield image

    def _image(self, report: Report, adopt: bool) -> Image:
        return Image(self.path, report, adopt=adopt)

    def content(self, size: int) -> bytes:
        """The bytes of the disk, as another program sees them."""
        data = self.path.read_bytes()
        assert len(data) == size
        return data

    def scribble(self, offset: int, data: bytes) -> None:
        """What a stranger does to it."""
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(data)
        os.utime(self.path, ns=(0, 0))

    def forget(self) -> None:
        """Lose the manifest."""
        self.path.with_name("os.raw.manifest").unlink()

    def spoil(self, change: Callable[[bytes], bytes]) -> None:
        """Make the manifest another one."""
        manifest = self.path.with_name("os.raw.manifest")
        manifest.write_bytes(change(manifest.read_bytes()))

    def died(self) -> None:
        """Time goes by after a run that died."""


class DevicePlace(FilePlace):
    """An image that takes its file for a block device: loop devices are not to be had everywhere."""

    def __init__(self, folder: Path, size: int) -> None:
        super().__init__(folder)
        self._size = size
        self.path.write_bytes(bytes(1 << 20) + b"\xaa" * (size - (2 << 20)) + bytes(1 << 20))

    def _image(self, report: Report, adopt: bool) -> Image:
        return Device(self.path, report, adopt=adopt)

    def content(self, size: int) -> bytes:
        """The bytes of the disk; the device may be larger."""
        return self.path.read_bytes()[:size]


class NbdPlace(DevicePlace):
    """An export of an NBD server, of the file `backing` in the folder. `url`: its URL, by the folder of the state."""

    def __init__(self, folder: Path, size: int, url: Callable[[Path], str]) -> None:
        super().__init__(folder, size)
        self.backing, state = folder / "backing", folder / "state"
        self.path.replace(self.backing)
        state.mkdir()
        self.path, self._export = state / "os.raw", Exports.of(url(state)).disk("os")

    def _image(self, report: Report, adopt: bool) -> Image:
        return Image(self.path, report, NbdMedium(self._export, "os", self.path.parent, adopt=adopt))

    def content(self, size: int) -> bytes:
        """The bytes of the disk; the export may be larger."""
        return self.backing.read_bytes()[:size]

    def scribble(self, offset: int, data: bytes) -> None:
        """What a stranger does to it."""
        with self.backing.open("r+b") as file:
            file.seek(offset)
            file.write(data)


class BlobPlace:
    """A VHD in Blob storage."""

    def __init__(self, storage: Storage, account: str, prefix: str = "replicas/web-1") -> None:
        self.storage, self.account, self.prefix = storage, account, prefix

    @property
    def url(self) -> str:
        """The destination as a user names it."""
        return f"blob://{self.account}/images/{self.prefix}"

    @contextmanager
    def folder(self, report: Report = silent) -> Iterator[BlobFolder]:
        """The place of all disks."""
        with places.open(self.url, report, self.storage) as folder:
            assert isinstance(folder, BlobFolder)
            yield folder

    @contextmanager
    def open(self, report: Report = silent) -> Iterator[Destination]:
        """The destination, for one run."""
        with self.folder(report) as folder:
            record = sets.begin(folder, "vm", sets.Begun("run", "now", ("os",)))
            with folder.disk("os") as disk:
                yield disk
                manifest = disk.committed
            if manifest is not None:
                sets.complete(folder, record, {"os": manifest.root()})

    def blob(self, name: str = "os.vhd") -> Blob:
        """A blob beside the others."""
        return self.storage.account(self.account).container("images").blob(f"{self.prefix}/{name}")

    def whole(self) -> bytes:
        """The blob's bytes: disk, zeros up to a whole MiB, footer."""
        found = self.blob().find()
        assert found is not None
        step = 4 << 20
        return b"".join(self.blob().read(at, min(step, found.size - at)) for at in range(0, found.size, step))

    def content(self, size: int) -> bytes:
        """The bytes of the disk; what follows must be zeros and a footer."""
        whole = self.whole()
        rounded = -(-size // (1 << 20)) << 20
        assert len(whole) == rounded + 512
        assert whole[size:rounded].count(0) == rounded - size
        return whole[:size]

    def scribble(self, offset: int, data: bytes) -> None:
        """What a stranger does to it."""
        blob = self.blob()
        blob.write(offset, data)

    def forget(self) -> None:
        """Lose the manifest."""
        self.blob("os.vhd.manifest").delete()

    def spoil(self, change: Callable[[bytes], bytes]) -> None:
        """Make the manifest another one."""
        manifest = self.blob("os.vhd.manifest")
        text = manifest.text()
        assert text is not None
        manifest.put(change(text))

    def died(self) -> None:
        """Time goes by after a run that died: the lease by which its folder is locked runs out."""
        self.break_lease(".vm")

    def break_lease(self, name: str = "os.vhd") -> None:
        """What a user does to a lease."""
        with suppress(ResourceExistsError, ResourceNotFoundError):
            BlobLeaseClient(self.blob(name)._client).break_lease(lease_break_period=0)


class SandboxPlace(BlobPlace):
    """A VHD in the sandbox's Blob storage."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.azure = Azure(Connection.from_json(sandbox.connection_info()), transport=sandbox.transport())
        super().__init__(Storage(self.azure, "sandbox", Held()), "sandboxstorage")

    def died(self) -> None:
        """Time goes by after a run that died: its leases run out."""
        self.sandbox.storage.end_leases()


class _Anyone:
    """A credential whose token says no more than Azurite looks at."""

    def get_token(self, *scopes: str, **options: object) -> AccessToken:
        import base64
        import json

        now = int(time.time())
        claims = {"nbf": now - 60, "iat": now - 60, "exp": now + 3600, "aud": "https://storage.azure.com"}
        claims["iss"] = "https://sts.windows.net/00000000-0000-0000-0000-000000000000/"

        def part(document: dict[str, object]) -> str:
            return base64.urlsafe_b64encode(json.dumps(document).encode()).rstrip(b"=").decode()

        return AccessToken(f"{part({'alg': 'none'})}.{part(claims)}.c2ln", now + 3600)


class AzuriteOnly:
    """What `Storage` needs of an Azure, where there is Blob storage and no resource manager."""

    subscription = "00000000-0000-0000-0000-000000000000"
    blob_version = ""

    def __init__(self, endpoint: str, certificate: Path) -> None:
        self.endpoint, self.certificate = endpoint, certificate
        self.credential: TokenCredential = _Anyone()
        self.transport = RequestsTransport(connection_verify=str(certificate))
        self._document: dict[str, Any] = {
            "id": f"/subscriptions/{self.subscription}/resourceGroups/g/providers/Microsoft.Storage/"
            f"storageAccounts/{ACCOUNT}",
            "name": ACCOUNT,
            "location": "westeurope",
            "properties": {"primaryEndpoints": {"blob": endpoint}},
        }

    def storage_account(self, id: str) -> dict[str, Any]:
        return self._document

    def storage_accounts(self) -> list[dict[str, Any]]:
        return [self._document]

    def storage_key(self, id: str) -> str:
        return KEY

    def storage(self) -> Storage:
        """Its Blob storage."""
        return Storage(cast(Azure, self), "g", Clock())

    def place(self, prefix: str) -> BlobPlace:
        """A VHD there. All tests of a process share the server: each takes a prefix of its own."""
        return BlobPlace(self.storage(), ACCOUNT, prefix)


def azurite_program() -> str | None:
    """Azurite's blob server: on the PATH, or in the folder that AZURITE_HOME names."""
    home = os.environ.get("AZURITE_HOME", "")
    path = f"{home}/node_modules/.bin" if home else None
    return shutil.which("azurite-blob", path=path) or shutil.which("azurite-blob")


@contextmanager
def azurite(program: str) -> Iterator[AzuriteOnly]:
    """Azurite with a certificate of its own, in a process of its own, for as long as this lasts."""
    with ExitStack() as ending:
        folder = Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="azurite-")))
        _certificate(folder)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [program, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(folder)]
        command += ["--cert", str(folder / "cert.pem"), "--key", str(folder / "key.pem"), "--oauth", "basic"]
        command += ["--skipApiVersionCheck", "--disableTelemetry", "--silent"]
        process = subprocess.Popen(
            command,
            env={**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        ending.callback(process.wait)
        ending.callback(process.terminate)
        assert process.stdout is not None
        ending.callback(process.stdout.close)
        # It says so when it listens; silence ends with the process.
        for line in process.stdout:
            if b"successfully listen" in line:
                break
        else:
            raise RuntimeError("Azurite did not start")
        azure = AzuriteOnly(f"https://127.0.0.1:{port}/{ACCOUNT}", folder / "cert.pem")
        ending.callback(azure.transport.close)
        yield azure


def _certificate(folder: Path) -> None:
    import ipaddress

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "azurite of the tests")])
    now = datetime.now(timezone.utc)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(names, critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    encoded = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "key.pem").write_bytes(encoded)
