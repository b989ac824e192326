"""The forms of those documents of Azure that are read without a model of an SDK, as far as they are read.

Of some requests the SDKs in use know nothing. The SDK of networks knows its own, but takes 27 MiB of memory and as long
to import as all others together, so it is loaded only where something in a network is made or deleted.
"""

from __future__ import annotations

SUBSCRIPTION = {"state": str}
PERMISSION = {"actions": [str], "notActions": [str]}
LOCK = {"id": str, "name": str, "properties": {"level": str}}
ACCOUNT = {"id": str, "name": str, "location": str, "properties": {"primaryEndpoints": {"blob": str}}}
CONTAINER = {"name": str}
PROVIDER_TYPES = {"resourceTypes": [{"resourceType": str, "apiVersions": [str]}]}
KEYS = {"keys": [{"value": str}]}
RESTRICTIONS = {
    "fieldRestrictions": [{"field": str, "restrictions": [{"result": str}]}],
    "contentEvaluationResult": {
        "policyEvaluations": [
            {
                "evaluationResult": str,
                "effectDetails": {"policyEffect": str},
                "policyInfo": {"policyAssignmentId": str},
            }
        ]
    },
}
USAGE = {"name": {"value": str}, "currentValue": int, "limit": int}

_REFERENCE = {"id": str}
_RESOURCE = {"id": str, "name": str, "location": str, "etag": str, "tags": dict[str, str], "properties": {}}
_LINK = {"id": str, "properties": {"link": str}}
_SUBNET = {
    "id": str,
    "name": str,
    "properties": {
        "addressPrefix": str,
        "addressPrefixes": [str],
        "delegations": [{"properties": {"serviceName": str}}],
        "networkSecurityGroup": _REFERENCE,
        "ipConfigurations": [_REFERENCE],
        "ipConfigurationProfiles": [_REFERENCE],
        "applicationGatewayIPConfigurations": [_REFERENCE],
        "privateEndpoints": [_REFERENCE],
        "resourceNavigationLinks": [_LINK],
        "serviceAssociationLinks": [_LINK],
    },
}
_IP_CONFIGURATION = {
    "properties": {
        "primary": bool,
        "privateIPAddress": str,
        "publicIPAddress": _REFERENCE,
        "subnet": _REFERENCE,
    }
}
# By kind, as in `names.TYPES`.
NETWORK = {
    "nic": {
        **_RESOURCE,
        "properties": {
            "macAddress": str,
            "ipConfigurations": [_IP_CONFIGURATION],
            "virtualMachine": _REFERENCE,
            "privateEndpoint": _REFERENCE,
            "privateLinkService": _REFERENCE,
        },
    },
    "ip": {
        **_RESOURCE,
        "properties": {"ipAddress": str, "ipConfiguration": _REFERENCE, "natGateway": _REFERENCE},
    },
    "nsg": {**_RESOURCE, "properties": {"networkInterfaces": [_REFERENCE], "subnets": [_REFERENCE]}},
    "vnet": {**_RESOURCE, "properties": {"subnets": [_SUBNET]}},
}
