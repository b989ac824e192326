"""The official SDKs' clients on a sandbox, in this process or over HTTPS."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
from azure.identity import ClientSecretCredential
from azure.mgmt.compute import ComputeManagementClient
from azure.mgmt.network import NetworkManagementClient
from azure.mgmt.resource.resources import ResourceManagementClient

from coriolis_azure.sandbox import Sandbox, serve
from harness.constants import DEADLINE

GROUP = "sandbox"
HERE = "westeurope"

# A JSON body. The SDKs' own types of bodies are closed; what is sent here may be wrong on purpose.
Body = Any


class Clients:
    """A sandbox as a program sees it: SDK clients, and `arm` for what the SDK would not send or show."""

    def __init__(self, info: dict[str, Any], transport: Any = None) -> None:
        self.info = info
        self.base = info["custom_cloud_properties"]["endpoints"]["resource_manager_endpoint"]
        self.subscription = info["subscription_id"]
        self.group = f"/subscriptions/{self.subscription}/resourceGroups/{GROUP}"
        self.options = {"transport": transport} if transport else {"connection_verify": info["ca_bundle"]}
        self.credential = self.login(info["service_principal_credentials"]["client_secret"])
        options: dict[str, Any] = {
            "base_url": self.base,
            "credential_scopes": ["https://management.azure.com/.default"],
            "retry_total": 0,
            **self.options,
        }
        self.compute = ComputeManagementClient(self.credential, self.subscription, **options)
        self.network = NetworkManagementClient(self.credential, self.subscription, **options)
        self.resource = ResourceManagementClient(self.credential, self.subscription, **options)
        self._session = transport.session if transport else requests.Session()
        self._verify = info["ca_bundle"]

    def login(self, secret: str, **changes: str) -> ClientSecretCredential:
        given = {
            "tenant_id": self.info["tenant"],
            "client_id": self.info["service_principal_credentials"]["client_id"],
            **changes,
        }
        return ClientSecretCredential(
            **given,
            client_secret=secret,
            authority=self.base,
            disable_instance_discovery=True,
            retry_total=0,
            **self.options,
        )

    def close(self) -> None:
        for each in (self.compute, self.network, self.resource, self.credential):
            each.close()
        self._session.close()

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> requests.Response:
        """One request, exactly so; `path` may be an absolute URL."""
        url = path if path.startswith("https://") else self.base + path
        return self._session.request(
            method, url, data=None if body is None else json.dumps(body), headers=headers, verify=self._verify
        )

    def arm(self, method: str, path: str, body: Any = None, version: str = "2026-04-01") -> requests.Response:
        """One ARM request with a good token; `path` without api-version, or an operation's URL."""
        token = self.credential.get_token("https://management.azure.com/.default").token
        if not path.startswith("https://"):
            path += ("&" if "?" in path else "?") + f"api-version={version}"
        return self.send(method, path, body, Authorization=f"Bearer {token}")

    def refused(self, method: str, path: str, body: Any = None) -> tuple[int, str, str]:
        """Status, code and message of a refusal."""
        answer = self.arm(method, path, body)
        error = answer.json()["error"]
        return answer.status_code, error["code"], error["message"]

    # short ways to what most tests need

    def id(self, kind: str, name: str) -> str:
        return f"{self.group}/providers/{kind}/{name}"

    def disk(self, name: str, gib: int = 1, **top: Any) -> Any:
        body: Body = {
            "location": HERE,
            "properties": {"creationData": {"createOption": "Empty"}, "diskSizeGB": gib},
            **top,
        }
        return self.compute.disks.begin_create_or_update(GROUP, name, body).result()

    def copy(self, name: str, source: str, *, snapshot: bool = False, **properties: Any) -> Any:
        creation = {"createOption": "Copy", "sourceResourceId": source}
        body: Body = {"location": HERE, "properties": {"creationData": creation, **properties}}
        operations: Any = self.compute.snapshots if snapshot else self.compute.disks
        return operations.begin_create_or_update(GROUP, name, body).result()

    def nic(self, name: str, **properties: Any) -> Any:
        subnet = {"id": self.id("Microsoft.Network/virtualNetworks", "sandbox-vnet") + "/subnets/default"}
        configuration = {"name": "ipconfig1", "properties": {"subnet": subnet, **properties}}
        body: Body = {"location": HERE, "properties": {"ipConfigurations": [configuration]}}
        return self.network.network_interfaces.begin_create_or_update(GROUP, name, body).result()

    def address(self, name: str) -> Any:
        body: Body = {
            "location": HERE,
            "sku": {"name": "Standard"},
            "properties": {"publicIPAllocationMethod": "Static"},
        }
        return self.network.public_ip_addresses.begin_create_or_update(GROUP, name, body).result()

    def firewall(self, name: str, port: str = "*", source: str = "*") -> Any:
        rule = {
            "protocol": "Tcp",
            "access": "Allow",
            "direction": "Inbound",
            "priority": 100,
            "sourceAddressPrefix": source,
            "sourcePortRange": "*",
            "destinationAddressPrefix": "*",
            "destinationPortRange": port,
        }
        body: Body = {
            "location": HERE,
            "properties": {"securityRules": [{"name": "ssh", "properties": rule}]},
        }
        return self.network.network_security_groups.begin_create_or_update(GROUP, name, body).result()


def vm_body(nic_id: str, **changes: Any) -> Body:
    """The body of a VM that runs no guest: it logs in with a password."""
    image = {"publisher": "Canonical", "offer": "ubuntu-24_04-lts", "sku": "server", "version": "latest"}
    properties = {
        "hardwareProfile": {"vmSize": "Standard_D2s_v5"},
        "storageProfile": {"imageReference": image, "osDisk": {"createOption": "FromImage"}, "dataDisks": []},
        "osProfile": {"computerName": "vm", "adminUsername": "coriolis", "adminPassword": "not-Used-1"},
        "networkProfile": {"networkInterfaces": [{"id": nic_id}]},
        **changes,
    }
    return {"location": HERE, "properties": properties}


@contextmanager
def in_process(sandbox: Sandbox) -> Iterator[Clients]:
    clients = Clients(sandbox.connection_info(), sandbox.transport())
    try:
        yield clients
    finally:
        clients.close()


@contextmanager
def serving(directory: Path, port: int = 0) -> Iterator[dict[str, Any]]:
    """`serve` in a thread; yields the connection settings it wrote."""
    stop, ready = threading.Event(), threading.Event()
    thread = threading.Thread(
        target=serve, args=(directory,), kwargs={"port": port, "ready": ready.set, "stop": stop}
    )
    thread.start()
    try:
        assert ready.wait(DEADLINE)
        yield json.loads((directory / "connection.json").read_text())
    finally:
        stop.set()
        thread.join(DEADLINE)
        assert not thread.is_alive()
