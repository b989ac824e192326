"""Guests: VMs of the sandbox that answer real SSH and see their disks come and go."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import paramiko
import pytest
from azure.core.exceptions import HttpResponseError
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from coriolis_azure.sandbox import Sandbox
from harness.clients import GROUP, Body, Clients, in_process, vm_body
from harness.constants import DEADLINE
from harness.waiting import eventually

MACHINES = "Microsoft.Compute/virtualMachines"
PORT = 22022


def key_pair() -> tuple[str, str]:
    """An ed25519 key as OpenSSH has it: private, public."""
    key = ed25519.Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return private.decode(), public.decode()


def parsed(private: str) -> paramiko.PKey:
    return paramiko.Ed25519Key.from_private_key(io.StringIO(private))


class Worker:
    """A guest made through the API, and one SSH connection to it, pinned to the key it was given."""

    def __init__(self, clients: Clients, name: str, nic: Any, address: str, **top: Any) -> None:
        self.name, self.address = name, address
        self.private, public = key_pair()
        self.host_private, host_public = key_pair()
        config = {
            "ssh_keys": {"ed25519_private": self.host_private, "ed25519_public": host_public},
            "write_files": [{"path": "/etc/ssh/sshd_config.d/10-port.conf", "content": f"Port {PORT}\n"}],
        }
        body = guest_body(nic.id, public, "#cloud-config\n" + json.dumps(config))
        for name_, value in top.items():
            body["properties"][name_] = value
        clients.compute.virtual_machines.begin_create_or_update(GROUP, name, body).result()
        self._client: paramiko.SSHClient | None = None

    def connect(self, *, user: str = "coriolis", private: str | None = None) -> paramiko.SSHClient:
        client = paramiko.SSHClient()
        known = f"[{self.address}]:{PORT}"
        client.get_host_keys().add(known, "ssh-ed25519", parsed(self.host_private))
        client.connect(
            self.address,
            PORT,
            user,
            pkey=parsed(private or self.private),
            allow_agent=False,
            look_for_keys=False,
            timeout=DEADLINE,
        )
        return client

    @property
    def client(self) -> paramiko.SSHClient:
        if self._client is None:
            self._client = self.connect()
        return self._client

    def run(self, command: str, data: bytes = b"") -> tuple[int, bytes, bytes]:
        """Exit status, stdout and stderr of a command."""
        stdin, stdout, stderr = self.client.exec_command(command, timeout=20)
        if data:
            stdin.write(data)
        stdin.channel.shutdown_write()
        return stdout.channel.recv_exit_status(), stdout.read(), stderr.read()

    def close(self) -> None:
        if self._client is not None:
            self._client.close()


def guest_body(nic_id: str, public: str, custom_data: str) -> Body:
    key = {"path": "/home/coriolis/.ssh/authorized_keys", "keyData": public}
    profile = {
        "computerName": "worker",
        "adminUsername": "coriolis",
        "customData": base64.b64encode(custom_data.encode()).decode(),
        "linuxConfiguration": {"disablePasswordAuthentication": True, "ssh": {"publicKeys": [key]}},
    }
    return vm_body(nic_id, osProfile=profile)


@contextmanager
def worker(clients: Clients, name: str = "worker", **top: Any) -> Iterator[Worker]:
    """A guest with a public address and an NSG that lets SSH in."""
    address, firewall = clients.address(f"{name}-ip"), clients.firewall(f"{name}-nsg", str(PORT))
    nic = clients.nic(f"{name}-nic", publicIPAddress={"id": address.id})
    body = nic.as_dict()
    body["properties"]["networkSecurityGroup"] = {"id": firewall.id}
    nic = clients.network.network_interfaces.begin_create_or_update(GROUP, f"{name}-nic", body).result()
    made = Worker(clients, name, nic, address.ip_address, **top)
    try:
        yield made
    finally:
        made.close()


def attach(clients: Clients, name: str, *pairs: tuple[int, str]) -> None:
    body: Body = {"dataDisksToAttach": [{"diskId": disk, "lun": lun} for lun, disk in pairs]}
    clients.compute.virtual_machines.begin_attach_detach_data_disks(GROUP, name, body).result()


def detach(clients: Clients, name: str, disk: str) -> None:
    body: Body = {"dataDisksToDetach": [{"diskId": disk}]}
    clients.compute.virtual_machines.begin_attach_detach_data_disks(GROUP, name, body).result()


def raw_disks(azure: Sandbox, clients: Clients, tmp_path: Path, *contents: bytes) -> list[str]:
    """Disks with these contents: clones of a source VM's."""
    files = []
    for index, content in enumerate(contents):
        files.append(tmp_path / f"{index}.raw")
        files[-1].write_bytes(content)
    azure.add_vm("source", files[0], files[1:])
    names = ["source-os", *(f"source-data-{index}" for index in range(len(files) - 1))]
    return [clients.copy(f"clone-{name}", clients.id("Microsoft.Compute/disks", name)).id for name in names]


def closed(address: str) -> bool:
    """Whether nobody answers with an SSH banner at the worker's port."""
    try:
        with socket.create_connection((address, PORT), timeout=DEADLINE) as connection:
            return connection.recv(10) == b""
    except OSError:
        return True


def test_a_guest_sees_its_disks_come_and_go(azure: Sandbox, clients: Clients, tmp_path: Path) -> None:
    one, two = raw_disks(azure, clients, tmp_path, b"first disk" + bytes(502), b"other disk" + bytes(1014))
    with worker(clients) as guest:
        read = "sudo -n sh -c 'head -c 10 /dev/disk/azure/scsi1/lun{}'"
        assert guest.run(read.format(0))[0] != 0
        attach(clients, "worker", (0, one), (5, two))
        assert guest.run(read.format(0)) == (0, b"first disk", b"")
        assert guest.run(read.format(5)) == (0, b"other disk", b"")
        assert guest.run("blockdev --getsize64 /dev/disk/azure/scsi1/lun5")[1] == b"1024\n"
        assert guest.run("readlink /dev/disk/azure/scsi1/lun0")[1].startswith(b"../../../sd")
        detach(clients, "worker", one)
        assert guest.run("ls /dev/disk/azure/scsi1")[1] == b"lun5\n"
        clients.compute.disks.begin_delete(GROUP, one.rpartition("/")[2]).result()


@pytest.mark.slow
def test_what_a_guest_writes_stays_in_its_disk(azure: Sandbox, clients: Clients, tmp_path: Path) -> None:
    (clone,) = raw_disks(azure, clients, tmp_path, b"A" * 512)
    twin = clients.copy("twin", clone)
    with worker(clients) as guest:
        attach(clients, "worker", (0, clone))
        write = "printf BBBB | dd of=/dev/disk/azure/scsi1/lun0 conv=notrunc status=none"
        assert guest.run(write) == (0, b"", b"")
        later = clients.copy("later", clone, snapshot=True)
        guest.run(write.replace("BBBB", "CCCC"))
    assert azure.content("source", "os").read_bytes() == b"A" * 512
    contents = azure._world.contents
    for resource, first in ((twin.id, b"AAAA"), (clone, b"CCCC"), (later.id, b"BBBB")):
        found = azure._world.state.find(resource)
        assert found is not None
        assert contents.path(found.hidden["content"]).read_bytes()[:4] == first


@pytest.mark.slow
def test_the_usual_devices_and_programs_work_inside(clients: Clients) -> None:
    with worker(clients) as guest:
        assert guest.run("cat", b"through " * 100_000) == (0, b"through " * 100_000, b"")
        assert (
            guest.run("head -c 4 /dev/zero; head -c 9 /dev/urandom | wc -c; : > /dev/null")[1]
            == b"\0\0\0\x009\n"
        )
        assert guest.run("echo out; echo err >&2; exit 7") == (7, b"out\n", b"err\n")
        assert guest.run("echo x > /dev/stdout; cat /dev/stdin", b"y")[1] == b"x\ny"
        assert guest.run("sudo -n cloud-init status --wait")[1] == b"status: done\n"
        assert guest.run("sudo -n systemctl stop udisks2; sudo -n blockdev --setro /dev/null")[0] == 0
        assert guest.run("cat > pushed && cat pushed", b"content")[1] == b"content"
        assert guest.run("sudo -n A=b python3 -c 'import os; print(os.environ[\"A\"])'")[1] == b"b\n"


def test_only_the_admin_with_its_key_gets_in(clients: Clients) -> None:
    with worker(clients) as guest:
        for wrong in ({"user": "root"}, {"private": key_pair()[0]}):
            with pytest.raises(paramiko.AuthenticationException):
                guest.connect(**wrong)
        transport = paramiko.Transport((guest.address, PORT))
        transport.start_client(timeout=DEADLINE)
        assert transport.get_remote_server_key() == parsed(guest.host_private)
        transport.close()
        assert guest.run("true")[0] == 0


@pytest.mark.slow
def test_much_data_in_both_directions_at_once(clients: Clients) -> None:
    with worker(clients) as guest:
        transport = guest.client.get_transport()
        assert transport is not None
        channel = transport.open_session()
        channel.exec_command("head -c 50000000 /dev/zero; cat | wc -c")
        for _ in range(4):
            channel.sendall(bytes(1 << 20))
        channel.shutdown_write()
        pieces = []
        while piece := channel.recv(1 << 20):
            pieces.append(piece)
        assert b"".join(pieces) == bytes(50_000_000) + f"{4 << 20}\n".encode()
        assert channel.recv_exit_status() == 0


@pytest.mark.slow
def test_a_session_that_breaks_off_takes_its_processes_along(clients: Clients) -> None:
    with worker(clients) as guest:
        client = guest.connect()
        _, stdout, _ = client.exec_command("echo $$; sleep 600 & sleep 600")
        shell = int(stdout.readline())
        assert _exists(shell)
        client.close()
        eventually(lambda: not _exists(shell))


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["begin_delete", "begin_deallocate", "begin_power_off"])
def test_a_guest_ends_with_its_vm(clients: Clients, verb: str) -> None:
    with worker(clients) as guest:
        _, stdout, _ = guest.client.exec_command("echo $$; sleep 600")
        shell = int(stdout.readline())
        assert not closed(guest.address)
        getattr(clients.compute.virtual_machines, verb)(GROUP, "worker").result()
        assert closed(guest.address)
        eventually(lambda: not _exists(shell))


@pytest.mark.slow
def test_a_stopped_guest_starts_again_with_its_disks(
    azure: Sandbox, clients: Clients, tmp_path: Path
) -> None:
    (clone,) = raw_disks(azure, clients, tmp_path, b"still here" + bytes(502))
    with worker(clients) as guest:
        attach(clients, "worker", (2, clone))
        clients.compute.virtual_machines.begin_deallocate(GROUP, "worker").result()
        clients.compute.virtual_machines.begin_start(GROUP, "worker").result()
        assert guest.run("head -c 10 /dev/disk/azure/scsi1/lun2")[1] == b"still here"


@pytest.mark.slow
def test_two_guests_live_side_by_side(azure: Sandbox, clients: Clients, tmp_path: Path) -> None:
    one, two = raw_disks(azure, clients, tmp_path, b"1" * 512, b"2" * 512)
    with worker(clients, "w1") as first, worker(clients, "w2") as second:
        attach(clients, "w1", (0, one))
        attach(clients, "w2", (0, two))
        assert first.address != second.address
        assert first.run("head -c 1 /dev/disk/azure/scsi1/lun0")[1] == b"1"
        assert second.run("head -c 1 /dev/disk/azure/scsi1/lun0")[1] == b"2"
        clients.compute.virtual_machines.begin_delete(GROUP, "w1").result()
        assert second.run("head -c 1 /dev/disk/azure/scsi1/lun0")[1] == b"2"


@pytest.mark.slow
def test_an_nvme_size_has_other_names(azure: Sandbox, clients: Clients, tmp_path: Path) -> None:
    (clone,) = raw_disks(azure, clients, tmp_path, b"n" * 512)
    with worker(clients, hardwareProfile={"vmSize": "Standard_D2s_v6"}) as guest:
        attach(clients, "worker", (1, clone))
        assert guest.run("head -c 1 /dev/disk/azure/data/by-lun/1")[1] == b"n"
        assert guest.run("ls /dev/disk/azure/scsi1")[0] != 0


def test_security_groups_guard_the_port(clients: Clients) -> None:
    with worker(clients) as guest:
        assert not closed(guest.address)
        clients.firewall("worker-nsg", str(PORT), source="203.0.113.7")
        assert closed(guest.address)
        clients.firewall("worker-nsg", f"{PORT - 1}-{PORT + 1}", source="127.0.0.1/32")
        assert not closed(guest.address)
        clients.firewall("worker-nsg", "22")
        assert closed(guest.address)


def test_a_public_address_without_a_security_group_is_closed(clients: Clients) -> None:
    address = clients.address("ip")
    nic = clients.nic("nic", publicIPAddress={"id": address.id})
    Worker(clients, "worker", nic, address.ip_address)
    assert closed(address.ip_address)


@pytest.mark.slow
def test_without_a_public_address_the_private_one_answers(clients: Clients) -> None:
    nic = clients.nic("nic")
    address = nic.ip_configurations[0].private_ip_address
    assert address.startswith("127.80.")
    guest = Worker(clients, "worker", nic, address)
    assert guest.run("echo here")[1] == b"here\n"
    guest.close()


@pytest.mark.parametrize(
    ("custom_data", "words"),
    [
        ("#cloud-config\nssh_keys: {\n", "JSON"),
        ('#cloud-config\n{"ssh_keys": {"ed25519_private": "x"}}', "private key"),
    ],
)
def test_a_guest_that_cannot_boot_fails_the_operation(clients: Clients, custom_data: str, words: str) -> None:
    body = guest_body(clients.nic("nic").id, key_pair()[1], custom_data)
    with pytest.raises(HttpResponseError, match=words) as failure:
        clients.compute.virtual_machines.begin_create_or_update(GROUP, "worker", body).result()
    assert failure.value.error is not None
    assert failure.value.error.code == "OSProvisioningClientError"
    assert clients.compute.virtual_machines.get(GROUP, "worker").provisioning_state == "Failed"
    clients.compute.virtual_machines.begin_delete(GROUP, "worker").result()


@pytest.mark.slow
def test_a_low_port_needs_rights_and_the_error_says_so(tmp_path: Path) -> None:
    """Port 22 is the default; whoever runs the sandbox without rights must learn what to set."""
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]);"
        "from test_sandbox_guest import *;"
        "s = Sandbox(Path(sys.argv[1])); c = in_process(s); a = c.__enter__();"
        "b = guest_body(a.nic('nic').id, key_pair()[1], '');\n"
        "try: a.compute.virtual_machines.begin_create_or_update(GROUP, 'w', b).result()\n"
        "except HttpResponseError as error: print(error.error.code, error.error.message)\n"
        "s.close()"
    )
    here = Path(__file__).parent
    unprivileged = ["unshare", "--user", "--map-user=1000", "--map-group=1000"] if os.geteuid() == 0 else []
    limit = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
    if limit.exists() and int(limit.read_text()) <= 22:
        pytest.skip("this machine lets everybody listen on port 22")
    if unprivileged and subprocess.run([*unprivileged, "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("root cannot give up its rights here: no user namespaces")
    done = subprocess.run(
        [*unprivileged, sys.executable, "-c", program, str(tmp_path / "azure"), str(here)],
        stdout=subprocess.PIPE,
        cwd=here.parent,
        text=True,
        check=True,
    )
    assert "OSProvisioningClientError" in done.stdout
    assert "above 1024 (export_worker_ssh_port)" in done.stdout


def test_the_private_host_key_is_not_shown(azure: Sandbox, clients: Clients) -> None:
    with worker(clients) as guest:
        shown = clients.arm("GET", clients.id(MACHINES, "worker")).text
        assert "customData" not in shown
        assert guest.host_private.splitlines()[1] not in shown


@pytest.mark.slow
def test_without_namespaces_python_still_sees_the_disks(tmp_path: Path) -> None:
    with Sandbox(tmp_path / "azure", namespaces=False) as azure, in_process(azure) as clients:
        (clone,) = raw_disks(azure, clients, tmp_path, b"seen" + bytes(508))
        with worker(clients) as guest:
            attach(clients, "worker", (0, clone))
            program = (
                "import os; p='/dev/disk/azure/scsi1/lun0'; f=os.open(p, os.O_RDONLY);"
                "print(os.path.exists(p), os.read(f, 4), open(p,'rb').read(4), os.path.realpath(p) != p,"
                "os.stat(p).st_size, os.listdir('/dev/disk/azure/scsi1'))"
            )
            status, out, err = guest.run(f'sudo -n python3 -I -c "{program}"')
            assert (status, err) == (0, b"")
            assert out == b"True b'seen' b'seen' True 512 ['lun0']\n"
        (method,) = (tmp_path / "azure" / "guests").glob("*/method.json")
        document = json.loads(method.read_text())
        assert document["method"] == "python paths"
        assert "only Python" in document["not_imitated"]


@pytest.mark.slow
def test_guests_end_when_the_sandbox_is_killed(tmp_path: Path) -> None:
    """A process that is killed outright cannot end its guests; they notice by themselves."""
    program = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[2]);"
        "from test_sandbox_guest import *;"
        "s = Sandbox(Path(sys.argv[1])); c = in_process(s); a = c.__enter__(); w = worker(a); g = w.__enter__();"
        "out = g.client.exec_command('echo $$; sleep 600')[1];"
        "print(g.address, out.readline().strip(), flush=True); time.sleep(600)"
    )
    here = Path(__file__).parent
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "azure"), str(here)],
        stdout=subprocess.PIPE,
        cwd=here.parent,
    ) as process:
        assert process.stdout is not None
        address, shell = process.stdout.readline().decode().split()
        assert not closed(address)
        process.send_signal(signal.SIGKILL)
        process.wait()
        eventually(lambda: closed(address) and not _exists(int(shell)))


@pytest.mark.slow
def test_guests_come_back_with_the_sandbox(tmp_path: Path) -> None:
    directory = tmp_path / "azure"
    with Sandbox(directory) as azure, in_process(azure) as clients, worker(clients) as guest:
        assert guest.run("true")[0] == 0
        guest.close()
        azure.close()
        assert closed(guest.address)
        with Sandbox(directory):
            eventually(lambda: not closed(guest.address))
            with guest.connect() as client:
                assert client.exec_command("echo again")[1].read() == b"again\n"


def _exists(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    # A zombie has ended; who should collect it is not our question.
    return "\nState:\tZ" not in status
