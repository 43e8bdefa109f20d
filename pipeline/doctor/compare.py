"""What the ranks of a job have told, side by side: where they differ, who is missing, who is slow."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from pipeline.doctor.facts import OF_RANK, Facts
from pipeline.doctor.findings import Finding, counted, fault, ok, warning
from pipeline.doctor.links import PAIR_BYTES, PHASES, STATISTICS_BYTES, Links, bus_bandwidth, slow

CLOCK_FAULT = 30.0  # seconds: no clock that is kept (NTP) is off by that; Slurm itself refuses a node at 300
CLOCK_WARNING = 1.0  # logs of nodes no longer tell what came first
SOCKETS = 2e9  # bytes a second of a rank that plain sockets reach, and InfiniBand exceeds
_SHOWN = 8


class Places:
    """How ranks and nodes are called in messages."""

    def __init__(self, facts: Sequence[Facts]):
        hosts = {fact.node: fact.host for fact in facts}
        twice = len(set(hosts.values())) < len(hosts)
        self._names = {node: f"{host} (node {node})" if twice else host for node, host in hosts.items()}
        self._all: dict[int, set[int]] = defaultdict(set)
        for fact in facts:
            self._all[fact.node].add(fact.rank)

    def of(self, facts: Sequence[Facts]) -> str:
        """A node where all of its ranks are meant, else the ranks."""
        by_node: dict[int, set[int]] = defaultdict(set)
        for fact in facts:
            by_node[fact.node].add(fact.rank)
        several = len(self._all) > 1
        names = [name if several and ranks == self._all[node] else f"{ranks_of(ranks)} on {name}"
                 for node, ranks in sorted(by_node.items()) for name in [self._names[node]]]  # fmt: skip
        return listed(names)


def listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def ranks_of(ranks: set[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {listed([str(rank) for rank in sorted(ranks)])}"


def check_presence(
    facts: Mapping[int, Facts], come: Mapping[int, str], world: int, local_size: int, hosts: Sequence[str],
    seconds: float,
) -> Iterator[Finding]:  # fmt: skip
    """Who has not come in the time. come: hosts of the ranks that did. hosts: the job's nodes, where it says them."""
    silent: dict[str, set[int]] = defaultdict(set)
    absent: dict[str, set[int]] = defaultdict(set)
    for rank in set(range(world)) - set(facts):
        node = rank // local_size  # in blocks, as srun and torchrun deal them out
        if rank in come:
            silent[come[rank]].add(rank)
        else:
            absent[hosts[node] if node < len(hosts) else f"node {node}"].add(rank)
    for host, ranks in sorted(absent.items(), key=lambda item: min(item[1])):
        yield fault("ranks", f"{ranks_of(ranks)} on {host} did not come within {seconds:g} s",
                    f"see whether {host} reaches rank 0 (interface, route, firewall) and sees the same Python and "
                    "run directory")  # fmt: skip
    for host, ranks in sorted(silent.items(), key=lambda item: min(item[1])):
        yield fault("ranks", f"{ranks_of(ranks)} on {host} came, and has not said what it sees within {seconds:g} s",
                    "see its file systems: one that does not answer holds whoever asks")  # fmt: skip
    if not silent and not absent:
        yield ok("ranks", f"all {world} have come")


def merged(facts: Sequence[Facts], places: Places) -> list[Finding]:
    """What ranks have found for themselves, each once, with who did."""
    same: dict[Finding, list[Facts]] = defaultdict(list)
    for fact in facts:
        for finding in fact.found:
            same[finding] += [fact] if finding.name in OF_RANK else _node(facts, fact)
    return [replace(finding, text=f"{places.of(who)}: {finding.text}") for finding, who in same.items()]


def check_devices(
    facts: Sequence[Facts], places: Places, accelerator: str, devices: int, asked: int
) -> Iterator[Finding]:
    """GPUs against what the run and the job want. asked: GPUs a node that the job asked Slurm for; 0 = nothing."""
    for granted, who in _apart(facts, "granted"):
        if asked and granted not in (-1, asked):
            yield fault("GPUs", f"{places.of(who)}: {counted(granted, 'GPU')} in CUDA_VISIBLE_DEVICES, the job asked "
                        f"for {asked} a node", "see nvidia-smi there and slurm.exclude the node; every rank must see "
                        "all GPUs of its node, without --gpus-per-task or --gpu-bind")  # fmt: skip
    some = any(fact.gpus for fact in facts)
    for gpus, who in _apart(facts, "gpus"):
        if accelerator == "cpu" or (accelerator == "auto" and not some):
            continue
        if gpus < devices:
            yield fault("GPUs", f"{places.of(who)}: torch finds {counted(gpus, 'GPU') if gpus else 'no GPU'} for "
                        f"cluster.devices = {devices}", "see nvidia-smi there, and that torch was built for its "
                        "driver; slurm.exclude the node, or lower cluster.devices")  # fmt: skip
        elif gpus > devices:
            yield warning("GPUs", f"{places.of(who)}: {gpus} GPUs for cluster.devices = {devices}: the others stand "
                          "idle", f"cluster.devices={gpus}")  # fmt: skip
    for (uuid, _), who in _grouped(facts, lambda fact: (fact.uuid, fact.node)):
        if uuid and 1 < len(who) <= who[0].gpus:
            yield fault("GPUs", f"{places.of(who)}: one GPU for all of them", "give each rank all GPUs of its node, "
                        "without --gpus-per-task or --gpu-bind")  # fmt: skip
    for name, key in (("GPU model", "device"), ("driver", "driver")):
        if len(groups := _apart(facts, key)) > 1:
            yield warning(name, f"differs: {_told(groups, places)}", "slurm.constraint=FEATURE chooses nodes of one "
                          "kind: the fast ones wait for the slow ones at every step")  # fmt: skip


def check_versions(facts: Sequence[Facts], places: Places) -> Iterator[Finding]:
    """The same code everywhere."""
    way = "give all nodes one environment: slurm.python, slurm.modules or a container"
    for name in facts[0].versions:
        groups = _grouped(facts, lambda fact, name=name: fact.versions.get(name, "none"))  # type: ignore[misc]
        if len(groups) > 1:
            yield fault(name, f"versions differ: {_told(groups, places)}", way)
    groups = _grouped(facts, lambda fact: "there" if fact.regions else "missing")
    if len(groups) > 1:
        yield fault("JPEG extension", f"differs, and images with it: {_told(groups, places)}",
                    f"{way}; or start a new run with data.decoder=whole")  # fmt: skip


def check_data(facts: Sequence[Facts], places: Places, wanted: str) -> Iterator[Finding]:
    """One data set everywhere. wanted: the run's digest, against which each node has compared its own already."""
    groups = _grouped([fact for fact in facts if fact.digest], lambda fact: fact.digest[:12])
    if len(groups) > 1 and not wanted:
        yield fault("digest", f"nodes hold different data sets: {_told(groups, places)}", "copy one to all")


def check_clocks(facts: Sequence[Facts], places: Places) -> Iterator[Finding]:
    """Against rank 0's. A clock is its node's: the first rank there that has asked speaks for it."""
    first = {fact.node: fact for fact in reversed(facts) if fact.apart_error >= 0}
    known = [first[node] for node in sorted(first)]
    far = [fact for fact in known if abs(fact.apart) - fact.apart_error > CLOCK_WARNING]
    for fact in far:
        make = fault if abs(fact.apart) - fact.apart_error > CLOCK_FAULT else warning
        side = "ahead of" if fact.apart > 0 else "behind"
        text = f"{places.of(_node(facts, fact))}: {abs(fact.apart):.1f} s {side} rank 0 on {facts[0].host}"
        yield make("clock", text, "set it (NTP), or slurm.exclude the node: times of logs, checkpoints and W&B would "
                   "not agree")  # fmt: skip
    if known and not far:
        most = max(known, key=lambda fact: abs(fact.apart))
        yield ok("clock", f"within {abs(most.apart) * 1000:.1f} ms of rank 0's, give or take "
                 f"{max(fact.apart_error for fact in known) * 1000:.1f}")  # fmt: skip


def check_directory(facts: Sequence[Facts], places: Places, seen: Mapping[int, bool], path: str) -> Iterator[Finding]:
    """What rank 0 wrote there, every rank has read. seen: by rank."""
    blind = [fact for fact in facts if not seen.get(fact.rank, True)]
    if blind:
        yield fault("run directory", f"{places.of(blind)}: what rank 0 wrote into {path} is not there",
                    "give a directory on a file system that all nodes share: run.dir")  # fmt: skip
    elif len(facts) > 1 and seen:
        yield ok("run directory", f"all ranks see {path}")


def check_paces(facts: Sequence[Facts], places: Places) -> Iterator[Finding]:
    """Who decodes or computes much slower than the middle one."""
    paces = (("decoding", "decoded", 1.0, "images/s a core", 0.5), ("computing", "flops", 1e-12, "TFLOP/s", 0.8))
    for what, key, unit, of_what, least in paces:
        known = [fact for fact in facts if getattr(fact, key) > 0]
        if len(known) < 2:
            continue
        middle = median(getattr(fact, key) for fact in known)
        late = [fact for fact in known if getattr(fact, key) < least * middle]
        if late:
            told = listed([f"{unit * getattr(fact, key):.3g}" for fact in late])
            yield warning(what, f"{places.of(late)}: {told} {of_what}, the middle rank {unit * middle:.3g}",
                          "see what else runs there (load, clocks, temperature), or slurm.exclude the node: all wait "
                          "for the slowest")  # fmt: skip


def check_reach(
    facts: Sequence[Facts], places: Places, unreached: Mapping[int, Mapping[str, str]]
) -> Iterator[Finding]:
    """Nodes that could not open a connection to others. unreached: by the asking rank, the other's rank and why."""
    by_rank = {fact.rank: fact for fact in facts}
    for rank, others in unreached.items():
        for other, why in others.items():
            target = by_rank[int(other)]
            asking, asked = (places.of(_node(facts, fact)) for fact in (by_rank[rank], target))
            yield fault("network", f"{asking} cannot reach {asked} at {target.address} ({why})", "see firewalls, and "
                        "name the network that joins the nodes: slurm.interface")  # fmt: skip


def check_links(
    facts: Sequence[Facts], places: Places, links: Mapping[int, Links], units: Sequence[Sequence[int]], backend: str,
    seconds: float,
) -> Iterator[Finding]:  # fmt: skip
    """How fast numbers travel, who holds them up, and who did not take part to the end."""
    by_rank = {fact.rank: fact for fact in facts}
    unfinished = {rank: link for rank, link in links.items() if link.phase != PHASES[-1]}
    mute = [fact for fact in facts if fact.rank not in links]
    if unfinished or mute:
        # A rank that waits in a later phase has passed this one: whoever is furthest behind is waited for.
        behind = min((PHASES.index(link.phase) for link in unfinished.values()), default=0)
        late = mute or [by_rank[rank] for rank, link in unfinished.items() if PHASES.index(link.phase) == behind]
        all_late = len(late) == len(facts)
        error = next((link.error for link in unfinished.values() if link.error), f"no end within {seconds:g} s")
        who = "no rank" if all_late else places.of(late)
        text = f"{backend}: {who} got beyond the {PHASES[behind]}"
        if not all_late:
            text = f"{backend}: {who} did not get beyond the {PHASES[behind]}, and the others wait"
        yield fault("network", f"{text} ({error})",
                    "NCCL_DEBUG=INFO (slurm.setup) shows why; name the network with slurm.interface and "
                    "slurm.infiniband")  # fmt: skip
        return
    first = links[min(links)]
    assert first.statistics is not None
    assert first.gradients is not None
    timing, sums = first.statistics, first.gradients
    yield ok("statistics", f"{timing.bytes:,} bytes of a level to all: {_time(timing.median)}, worst "
             f"{_time(timing.worst)} of {timing.repeats} ({backend})")  # fmt: skip
    speed = bus_bandwidth(sums, len(facts))
    yield ok("gradients", f"sum of {sums.bytes / 1e6:.0f} MB: {_time(sums.median)}, worst {_time(sums.worst)} of "
             f"{sums.repeats}; {speed / 1e9:.3g} GB/s a rank")  # fmt: skip
    yield from _check_slow(by_rank, places, links, units, backend)
    if len({fact.node for fact in facts}) > 1:
        yield from _check_adapters(facts, places, backend, speed)


def _check_adapters(facts: Sequence[Facts], places: Places, backend: str, speed: float) -> Iterator[Finding]:
    """InfiniBand that is there and cannot have been taken. speed: bytes a second of a rank's link."""
    with_adapters = [fact for fact in facts if fact.infiniband]
    if with_adapters and len(with_adapters) < len(facts):
        yield warning("InfiniBand", f"only {places.of(with_adapters)} with an adapter that has a link: sums take what "
                      "all share", "slurm.constraint or slurm.exclude")  # fmt: skip
    elif with_adapters and backend == "nccl" and speed < SOCKETS:
        yield warning("InfiniBand", f"every node has it, and gradients travel at {speed / 1e9:.2g} GB/s, as over "
                      "sockets", "NCCL_DEBUG=INFO (slurm.setup) shows whether NET/IB is taken; slurm.infiniband names "
                      "the adapters")  # fmt: skip


def _check_slow(
    by_rank: Mapping[int, Facts],
    places: Places,
    links: Mapping[int, Links],
    units: Sequence[Sequence[int]],
    backend: str,
) -> Iterator[Finding]:
    # Below these a difference is the scheduler's: gloo's threads share the cores with everything else.
    leasts = (1e-3, 3e-3) if backend == "gloo" else (5e-5, 2e-4)
    named: dict[int, list[str]] = defaultdict(list)
    for which, (size, least) in enumerate(zip((STATISTICS_BYTES, PAIR_BYTES), leasts, strict=True)):
        # What a rank sends is done for it once its kernel has taken it: the pair takes as long as the slower sees.
        times = {rank: {other: max(pair[which], links[other].pairs[rank][which]) for other, pair in link.pairs.items()}
                 for rank, link in links.items()}  # fmt: skip
        best = {rank: min(each.values()) for rank, each in times.items() if each}
        for number in slow(times, units, least=least):
            own = min(best[rank] for rank in units[number] if rank in best)
            others = median(value for rank, value in best.items() if rank not in units[number])
            named[number].append(f"{size:,} bytes take {_time(own)} with its best partner, {_time(others)} elsewhere")
    for number, said in named.items():
        who = places.of([by_rank[rank] for rank in units[number]])
        yield warning("slow link", f"{who}: {'; '.join(said)}", "slurm.exclude the node, or have its link looked at: "
                      "every step waits for it")  # fmt: skip


def units_of(facts: Sequence[Facts]) -> list[list[int]]:
    """Ranks by node, or each rank for itself where there is one node."""
    nodes: dict[int, list[int]] = defaultdict(list)
    for fact in facts:
        nodes[fact.node].append(fact.rank)
    return list(nodes.values()) if len(nodes) > 1 else [[fact.rank] for fact in facts]


def _node(facts: Sequence[Facts], fact: Facts) -> list[Facts]:
    """All ranks of its node that have come."""
    return [other for other in facts if other.node == fact.node]


Groups = list[tuple[Any, list[Facts]]]


def _apart(facts: Sequence[Facts], key: str) -> Groups:
    return _grouped(facts, lambda fact: getattr(fact, key))


def _grouped(facts: Sequence[Facts], key: Callable[[Facts], Hashable]) -> Groups:
    """Ranks by what they have, the most frequent first."""
    groups: dict[Hashable, list[Facts]] = defaultdict(list)
    for fact in facts:
        groups[key(fact)].append(fact)
    return sorted(groups.items(), key=lambda group: -len(group[1]))


def _told(groups: Groups, places: Places) -> str:
    """Who has something else than most."""
    others = "; ".join(f"{value or 'none'} on {places.of(who)}" for value, who in groups[1:])
    return f"{others}; the others {groups[0][0] or 'none'}"


def _time(seconds: float) -> str:
    for unit, length in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
