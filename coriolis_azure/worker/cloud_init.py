"""The cloud-init configuration of the worker: host key, SSH port, and rules that keep the system off the clones.

A clone looks like the disk of a machine, with labels and UUIDs that another clone or the worker itself may have too.
Nothing may scan, assemble, mount or write to it, and its presence must not redirect any link below /dev/disk.
"""

from __future__ import annotations

import json

from ..model import Json

# Run once, at the first boot, when only the worker's own disks are attached. It identifies them by their place: the
# controller and the address on it. That does not depend on device letters or host adapter numbers, so it still holds
# after a reboot or on another host. An NVMe namespace is identified by its number: on Azure the OS disk and each local
# disk have the number 1, data disks higher ones.
_RULES = "/etc/udev/rules.d/61-coriolis-azure.rules"
_OWN_DISKS = r"""
rules=$1
[ -s $rules ] && exit 0
udevadm settle --timeout=60
own() {
    for disk in /sys/block/sd* /sys/block/nvme*; do
        [ -e "$disk" ] || continue
        if [ -r "$disk/nsid" ]; then
            echo "KERNEL==\"nvme*\", ATTRS{nsid}==\"$(cat "$disk/nsid")\", GOTO=\"coriolis_own\""
            continue
        fi
        place=$(readlink -f "$disk" | sed -E '
            s|^/sys||
            s|^.*/([0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}/host)|*/\1|
            s|/host[0-9]+/target[0-9]+:([0-9:]+)/[0-9]+:([0-9:]+)/block/.*$|/host*/target*:\1/*:\2/block/*|')
        echo "DEVPATH==\"$place\", GOTO=\"coriolis_own\""
    done
}
{
    echo 'ACTION=="remove", GOTO="coriolis_end"'
    echo 'SUBSYSTEM!="block", GOTO="coriolis_end"'
    echo 'KERNEL!="sd*|nvme*", GOTO="coriolis_end"'
    own
    echo 'SYMLINK="", OPTIONS+="nowatch", RUN+="/sbin/blockdev --setro $devnode"'
    echo 'ENV{SYSTEMD_READY}="0", ENV{UDISKS_IGNORE}="1", ENV{ID_FS_TYPE}="", ENV{ID_FS_USAGE}=""'
    echo 'GOTO="coriolis_end"'
    echo 'LABEL="coriolis_own"'
    echo 'OPTIONS+="link_priority=100"'
    echo 'LABEL="coriolis_end"'
} > $rules.new
sync $rules.new && mv $rules.new $rules && udevadm control --reload
"""
_SCANNERS = "multipathd.service multipathd.socket udisks2.service"
# A socket-activated server gets its port from the socket unit, which a generator builds from the file we wrote.
_OTHER_PORT = """
systemctl daemon-reload
if systemctl --quiet is-active ssh.socket; then
    systemctl stop ssh.service
    systemctl restart ssh.socket
else
    systemctl try-restart ssh.service || systemctl try-restart sshd.service
fi
"""


def cloud_config(host_private: str, host_public: str, port: int) -> str:
    """The customData of a worker, as JSON, which is valid YAML.

    Azure never returns customData, so the private host key can be read only on the worker.
    """
    files = [
        _file("/etc/lvm/lvmlocal.conf", 'devices {\n    global_filter = [ "r|.*|" ]\n}\n'),
        _file("/etc/mdadm/mdadm.conf.d/coriolis.conf", "AUTO -all\n"),
    ]
    config: Json = {
        "ssh_deletekeys": True,
        "ssh_genkeytypes": ["ed25519"],
        "ssh_keys": {"ed25519_private": host_private, "ed25519_public": host_public},
        "package_update": False,
        # bootcmd runs before the SSH server starts, and so before any clone is attached.
        "bootcmd": [f"systemctl mask --now {_SCANNERS}", ["sh", "-c", _OWN_DISKS, "own-disks", _RULES]],
        "write_files": files,
    }
    if port != 22:
        files.append(_file("/etc/ssh/sshd_config.d/10-coriolis-azure.conf", f"Port {port}\n"))
        config["runcmd"] = [_OTHER_PORT]
    return "#cloud-config\n" + json.dumps(config, indent=1)


def _file(path: str, content: str) -> Json:
    return {"path": path, "content": content, "permissions": "0644"}
