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

from pipeline.doctor.findings import Finding, fault, ok, warning
from pipeline.launch.patience import within

_SIOCGIFADDR, _SIOCGIFFLAGS, _UP = 0x8915, 0x8913, 1


def check_host(
    name: str, nodes: int, resolve: Callable[[str], str] = socket.gethostbyname, seconds: float = 4.0,
    chosen: str = "",
) -> Iterator[Finding]:  # fmt: skip
    """The machine's own name, by which gloo finds its address unless it is given an interface (`chosen`)."""
    make = fault if nodes > 1 and not chosen else warning
    other = ", or set slurm.interface or GLOO_SOCKET_IFNAME" if nodes > 1 and not chosen else ""
    began = time.monotonic()
    try:
        address = within(seconds, lambda: resolve(name))
    except (OSError, UnicodeError) as error:
        yield make("host name", f"{name} does not resolve ({getattr(error, 'strerror', None) or error})",
                   f"add it to /etc/hosts{other}")  # fmt: skip
        return
    took = time.monotonic() - began
    if took > 1:
        yield warning("host name", f"{name} took {took:.1f} s to resolve: so does every start", "add it to /etc/hosts")
    elif nodes > 1 and not chosen and address.startswith("127."):
        yield fault("host name", f"{name} resolves to the loopback: other nodes would look for it on themselves",
                    f"mend /etc/hosts{other}")  # fmt: skip
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
    """Adapters that have a port with a link."""
    return sorted(path.name for path in place.iterdir() if _has_link(path)) if place.is_dir() else []


def _has_link(adapter: Path) -> bool:
    states = []
    with suppress(OSError):
        states = [path.read_text() for path in adapter.glob("ports/*/state")]
    return any("ACTIVE" in state for state in states)


def default_interface(routes: Path = Path("/proc/net/route")) -> str:
    """The interface of the default route; "" where there is none."""
    with suppress(OSError):
        for line in routes.read_text().splitlines()[1:]:
            name, destination = line.split()[:2]
            if destination == "00000000":
                return name
    return ""


def interface_towards(host: str, up: Sequence[Interface]) -> str:
    """The interface by which this machine reaches a host; "" where it cannot. Sends nothing."""
    with suppress(OSError, UnicodeError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        asked.connect((host, 9))
        own = asked.getsockname()[0]
        return next((i.name for i in up if i.address == own), "")
    return ""


def check_network(
    up: Sequence[Interface],
    nodes: int,
    host_address: str,
    infiniband: Sequence[str],
    environment: Mapping[str, str],
    default: str = "",
    towards: str = "",
) -> Iterator[Finding]:
    """Which interfaces there are, and which one gloo and NCCL would take.

    environment: of the ranks. default, towards: interfaces of the default route, and by which rank 0 is reached.
    """
    outward = [i.name for i in up if i.name != "lo"]
    text = ", ".join(f"{i.name} ({', '.join(i.families)})" for i in up) or "none is up"
    if infiniband:
        text += f"; InfiniBand {', '.join(infiniband)}"
    if nodes > 1 and not outward:
        yield fault("network", f"{text}: no other node can be reached", "bring an interface up")
        return
    taken = {}
    for library, variable in (("gloo", "GLOO_SOCKET_IFNAME"), ("NCCL", "NCCL_SOCKET_IFNAME")):
        named = environment.get(variable, "")
        plain = named.lstrip("^=")
        if named and not named.startswith("^") and not any(i.name.startswith(tuple(plain.split(","))) for i in up):
            yield (fault if nodes > 1 else warning)(
                "network", f"{variable} = {named}, and no such interface is up ({text})", f"unset {variable}, or name "
                f"one of {[i.name for i in up]} (slurm.interface)")  # fmt: skip
            return
        taken[library] = named or _taken(library, up, host_address)
    text += "".join(f"; {library} takes {name}" for library, name in taken.items())
    ways = {"the default route is": default, "rank 0 is reached by": towards}
    text += "".join(f"; {which} {name}" for which, name in ways.items() if name)
    own = [i.name for i in up if i.address and i.name != "lo" and not i.name.startswith("docker")]
    left = not environment.get("GLOO_SOCKET_IFNAME")
    if nodes > 1 and left and len(own) > 1 and towards not in ("", "lo", taken["gloo"]):
        yield warning("network", f"{text}: gloo would take another than the one that leads to rank 0",
                      f"slurm.interface={towards}, or another of {own} that all nodes share")  # fmt: skip
    else:
        yield ok("network", text)
    yield from _check_infiniband(infiniband, environment)


def _check_infiniband(adapters: Sequence[str], environment: Mapping[str, str]) -> Iterator[Finding]:
    if not adapters:
        return
    wanted = environment.get("NCCL_IB_HCA", "")
    known = [name.partition(":")[0] for name in wanted.lstrip("^=").split(",") if name]
    absent = [name for name in known if not any(adapter.startswith(name) for adapter in adapters)]
    if environment.get("NCCL_IB_DISABLE", "0") not in ("", "0"):
        yield warning("InfiniBand", f"{', '.join(adapters)} {'has' if len(adapters) == 1 else 'have'} a link, and "
                      "NCCL is told to leave it out", "slurm.infiniband empty, NCCL_IB_DISABLE unset")  # fmt: skip
    elif absent and not wanted.startswith("^"):
        yield fault("InfiniBand", f"NCCL_IB_HCA = {wanted}, and {', '.join(absent)} has no link here",
                    f"slurm.infiniband={','.join(adapters)}")  # fmt: skip


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
