"""Names and tags are derived, so any process finds what another made."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest

from coriolis_azure.azure import names
from coriolis_azure.errors import Unreadable
from coriolis_azure.model import canonical_location

VM = "/subscriptions/s/resourceGroups/Group/providers/Microsoft.Compute/virtualMachines/web-1"


def test_the_same_inputs_give_the_same_name() -> None:
    assert names.resource("1234abcd", "worker") == names.resource("1234abcd", "worker")
    assert len(names.resource(names.new_run(), "snapshot-data-63")) <= 64


def test_ids_are_taken_apart_and_put_together_whatever_their_case() -> None:
    assert names.resource_id("s", "Group", "vm", "web-1") == VM
    for id in (VM, VM.upper(), VM.lower()):
        assert names.kind_of(id) == "vm"
        assert names.group_of(id).lower() == "group"
        assert names.same(id, VM)
    assert names.network_of("/x/resourceGroups/g/providers/M.N/virtualNetworks/net/subnets/sub") == "net/sub"


def test_an_arm_id_is_told_from_a_name_by_its_type() -> None:
    for text in (
        "web-1",
        "net/sub",
        "/subscriptions/s/resourceGroups/g",
        f"{VM}/extensions",
        f"x{VM}",
        f"{VM}/",
    ):
        assert names.ArmId.parsed(text) is None
    for text in (VM, VM.upper()):
        id = names.ArmId.parsed(text)
        assert id == text
        assert id.subscription.lower() == "s"
        assert id.type == names.TYPES["vm"].lower()
    subnet = names.ArmId.parsed(
        "/subscriptions/s/resourceGroups/g/providers/M.N/virtualNetworks/net/subnets/sub"
    )
    assert subnet is not None
    assert subnet.type == "m.n/virtualnetworks/subnets"


def test_an_id_of_a_kind_we_never_make_is_refused() -> None:
    with pytest.raises(Unreadable, match="not the ARM id of a resource type in use here"):
        names.kind_of("/subscriptions/s/resourceGroups/g/providers/Microsoft.Storage/storageAccounts/a")


def test_tags_carry_run_role_instance_and_moment_and_the_users_own() -> None:
    made = datetime(2026, 11, 24, 3, 0, tzinfo=timezone.utc)
    tags = names.tags("r", "worker", "web-1", made, {"cost": "42"})
    assert tags["cost"] == "42"
    assert names.moment(tags[names.MADE_TAG]) == made
    assert names.moment("yesterday") is None


def test_locations_are_compared_as_azure_does() -> None:
    assert canonical_location("West Europe") == canonical_location("westeurope")
