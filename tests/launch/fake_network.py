"""A network of hosts, each in a network namespace of its own, so that one can be cut off.

Needs root and `ip` (iproute2).
"""

import os
import shutil
import socket
import subprocess
from pathlib import Path

HOSTS = Path("/etc/netns")
BRIDGE = "vitjaxbr"
PREFIX = "10.213.0"


def is_possible():
    """Returns whether this process may make namespaces."""
    try:
        _ip("netns", "add", "vitjax-probe")
        _ip("netns", "del", "vitjax-probe")
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def is_used():
    return os.environ.get("FAKE_GCLOUD_NETWORK") == "1"


def make():
    """Makes the switch that hosts are plugged into."""
    remove()
    _ip("link", "add", BRIDGE, "type", "bridge")
    _ip("addr", "add", f"{PREFIX}.254/24", "dev", BRIDGE)
    _ip("link", "set", BRIDGE, "up")


def address(number):
    return f"{PREFIX}.{number + 1}"


def namespace(host):
    return f"vitjax-{host}"


def connect(host, number, machine=""):
    """Gives a host a namespace, or the one that it had, with a working link.

    machine: the name of the machine that commands on this host see; that of this one by default.
    """
    inside, name = f"vitjax{number}", namespace(host)
    if name not in _names():
        _ip("netns", "add", name)
        _ip("link", "add", inside, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", inside, "master", BRIDGE)
        _ip("link", "set", inside, "up")
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "addr", "add", f"{address(number)}/24", "dev", "eth0")
        # `ip netns exec` puts this in the place of /etc/hosts: Gloo announces the address that the
        # name of its machine stands for.
        (HOSTS / name).mkdir(parents=True, exist_ok=True)
        names = f"127.0.0.1 localhost\n{address(number)} {machine or socket.gethostname()}\n"
        (HOSTS / name / "hosts").write_text(names)
    _ip("-n", name, "link", "set", "eth0", "up")


def cut(host):
    """Takes a host's cable out; its processes go on."""
    _ip("-n", namespace(host), "link", "set", "eth0", "down")


def is_cut(host):
    return "state UP" not in _ip("-n", namespace(host), "link", "show", "eth0")


def inside(host, *, as_machine=False):
    """The words before a command that run it on a host, and on a machine of the host's name."""
    named = ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', host]
    return ["ip", "netns", "exec", namespace(host), *(named if as_machine else [])]


def remove():
    # Of a namespace that is deleted the kernel takes links away only later.
    for line in _ip("-o", "link", "show", "type", "veth").splitlines():
        link = line.split(": ")[1].partition("@")[0]
        if link.startswith("vitjax"):
            _ip("link", "del", link)
    for host in _names():
        _ip("netns", "del", host)
        shutil.rmtree(HOSTS / host, ignore_errors=True)
    subprocess.run(["ip", "link", "del", BRIDGE], check=False, capture_output=True)


def _names():
    names = [line.split()[0] for line in _ip("netns", "list").splitlines()]
    return [name for name in names if name.startswith(namespace(""))]


def _ip(*arguments):
    done = subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    return done.stdout
