"""This machine's name and network: which interfaces are up, and which of them gloo and NCCL would take."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fcntl import ioctl
from pathlib import Path

from pipeline.doctor.findings import Finding, fault, ok, warning, within

_SIOCGIFADDR, _SIOCGIFFLAGS, _UP = 0x8915, 0x8913, 1


def check_host(name: str, nodes: int, resolve: Callable[[str], str] = socket.gethostbyname, seconds: float = 4.0
               ) -> Iterator[Finding]:  # fmt: skip
    """The machine's own name, by which gloo finds its address."""
    make = fault if nodes > 1 else warning
    began = time.monotonic()
    try:
        address = within(seconds, lambda: resolve(name))
    except (OSError, UnicodeError) as error:
        yield make("host name", f"{name} does not resolve ({getattr(error, 'strerror', None) or error})",
                   f"add it to /etc/hosts{', or set GLOO_SOCKET_IFNAME' if nodes > 1 else ''}")  # fmt: skip
        return
    took = time.monotonic() - began
    if took > 1:
        yield warning("host name", f"{name} took {took:.1f} s to resolve: so does every start", "add it to /etc/hosts")
    elif nodes > 1 and address.startswith("127."):
        yield fault("host name", f"{name} resolves to the loopback: other nodes would look for it on themselves",
                    "mend /etc/hosts, or set GLOO_SOCKET_IFNAME")  # fmt: skip
    else:
        yield ok("host name", f"{name} resolves")


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface that is up. families: of its addresses, IPv4 or IPv6. address: the IPv4 one."""

    name: str
    families: tuple[str, ...]
    address: str = ""


def interfaces() -> list[Interface]:
    """Those of this machine that are up and have an address."""
    sixes = set[str]()
    with suppress(OSError):
        sixes = {line.split()[5] for line in Path("/proc/net/if_inet6").read_text().splitlines()}
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with suppress(OSError):
                if not struct.unpack("H", ioctl(asked, _SIOCGIFFLAGS, request)[16:18])[0] & _UP:
                    continue
            address = ""
            with suppress(OSError):
                address = socket.inet_ntoa(ioctl(asked, _SIOCGIFADDR, request)[20:24])
            families = (*(["IPv4"] if address else []), *(["IPv6"] if name in sixes else []))
            if families:
                found.append(Interface(name, families, address))
    return found


def infiniband(place: Path = Path("/sys/class/infiniband")) -> list[str]:
    return sorted(path.name for path in place.iterdir()) if place.is_dir() else []


def check_network(
    up: Sequence[Interface], nodes: int, host_address: str, infiniband: Sequence[str], environment: Mapping[str, str]
) -> Iterator[Finding]:
    """Which interfaces there are, and which one gloo and NCCL would take."""
    outward = [i.name for i in up if i.name != "lo"]
    text = ", ".join(f"{i.name} ({', '.join(i.families)})" for i in up) or "none is up"
    if infiniband:
        text += f"; InfiniBand {', '.join(infiniband)}"
    if nodes > 1 and not outward:
        yield fault("network", f"{text}: no other node can be reached", "bring an interface up")
        return
    taken = []
    for library, variable in (("gloo", "GLOO_SOCKET_IFNAME"), ("NCCL", "NCCL_SOCKET_IFNAME")):
        named = environment.get(variable, "")
        plain = named.lstrip("^=")
        if named and not named.startswith("^") and not any(i.name.startswith(tuple(plain.split(","))) for i in up):
            yield (fault if nodes > 1 else warning)(
                "network", f"{variable} = {named}, and no such interface is up ({text})", f"unset {variable}, or name "
                f"one of {[i.name for i in up]}")  # fmt: skip
            return
        taken.append(f"{library} takes {named or _taken(library, up, host_address)}")
    yield ok("network", f"{text}; {', '.join(taken)}")


def _taken(library: str, up: Sequence[Interface], host_address: str) -> str:
    """By gloo's rule, the interface of the host's own address; by NCCL's, an ib one, any but lo and docker, those."""
    names = [i.name for i in up]
    if library == "gloo":
        return next((i.name for i in up if i.address and i.address == host_address), "lo" if "lo" in names else "none")
    ranked = sorted(
        names, key=lambda name: (not name.startswith("ib"), name.startswith(("docker", "lo")), name == "lo")
    )
    return ranked[0] if ranked else "none"


def address_of(name: str) -> str:
    """The IPv4 address of a host; "" where it has none, or takes long."""
    try:
        return within(2.0, lambda: socket.gethostbyname(name))
    except (OSError, UnicodeError):
        return ""
