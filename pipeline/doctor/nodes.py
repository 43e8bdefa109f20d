"""All ranks of a job look, before its first step: each where it stands, rank 0 at all of it, and all end with one code.

come     over a TCP store; who has not, by when, is named, and the others are shown all the same
look     facts.py: device, data set, clock, decoding, network of each rank
reach    the first rank of each node opens a connection to those of the others: gloo and NCCL would wait for minutes
measure  links.py: how fast numbers travel, in a thread that is left to itself when its time is over
judge    compare.py, on rank 0
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from pipeline.config import Config, ConfigError
from pipeline.doctor import compare
from pipeline.doctor.clock import TimeServer, clock_apart
from pipeline.doctor.facts import Facts, backend_of, begun, device_of, host_name, look, see_gpu
from pipeline.doctor.findings import Finding, fault, guarded, of_message
from pipeline.doctor.links import Links, Timing, measure
from pipeline.doctor.machine import existing
from pipeline.doctor.meeting import LostError, Meeting
from pipeline.doctor.report import exit_code
from pipeline.launch.patience import within
from pipeline.world import World

ARRIVAL_SECONDS = 120.0  # an interpreter on a file system of a thousand nodes takes a while to start
LINK_SECONDS, REACH_SECONDS = 60.0, 3.0
HOSTS = "PIPELINE_HOSTS"  # set by our job script: the job's nodes, so that one that has not come has a name
_NEIGHBOURS = 16  # nodes that each tries to reach


@dataclass(slots=True)
class Examined:
    """What rank 0 knows in the end. unfinished: a thread still waits in a collective."""

    facts: list[Facts]
    links: dict[int, Links]
    backend: str
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class End:
    """How it ended here. stuck: a thread still waits for others, and would keep the process from ending."""

    code: int
    stuck: bool = False


def take_part(
    world: World,
    host: str,
    port: int,
    read: Callable[[], Config],
    report: Callable[[Examined], None],
    seconds: float = ARRIVAL_SECONDS,
) -> End:
    """This rank's part. host, port: of rank 0's store. read: the config; may raise ConfigError. report: on rank 0.

    Raises LostError where rank 0 cannot be had.
    """
    meeting = Meeting(world, host, port, seconds)
    meeting.say("come", host_name())
    facts, config = _config(world, read)
    with _token(config if world.leads else None) as token:
        clock = TimeServer()
        try:
            facts.port = clock.port
            if world.leads:
                meeting.say("hello", {"port": clock.port, **token})
            if config is not None:
                look(facts, config, host)
            hello = _heard(meeting, "hello", seconds)
            seen = _seen(hello)
            if not world.leads:
                _compare_clock(facts, host, int(hello["port"]))
            device = torch.device("cpu") if config is None else device_of(config, world)
            if device.type == "cuda":
                facts.note(guarded("machine", "GPU", lambda: see_gpu(facts, device)))
            meeting.say("facts", {"facts": asdict(facts), "seen": seen})
            if world.leads:
                return _lead(meeting, config, device, token["path"], report, seconds)
            return _follow(meeting, device, seconds)
        finally:
            clock.close()


def _follow(meeting: Meeting, device: torch.device, seconds: float) -> End:
    links, stuck = Links(), False
    for_reach = _heard(meeting, "roll", 2 * seconds + 60)
    meeting.say("reach", _unreached(meeting.world, for_reach["first"]))
    if _heard(meeting, "go", 60 + REACH_SECONDS):
        stuck = _measure(links, meeting, for_reach["units"], device)
        meeting.say("links", asdict(links))
    code = int(_heard(meeting, "verdict", LINK_SECONDS + 60))
    meeting.say("left", True)
    return End(code, stuck)


def _lead(
    meeting: Meeting, config: Config | None, device: torch.device, path: str, report: Callable[[Examined], None],
    seconds: float,
) -> End:  # fmt: skip
    world = meeting.world
    told = meeting.hear("facts", seconds)
    come = meeting.hear("come", 0)
    facts = [Facts(**told[rank]["facts"]) for rank in sorted(told)]
    units = compare.units_of(facts)
    backend = backend_of(device, world)
    found = guarded("nodes", "ranks", lambda: compare.check_presence(
        {fact.rank: fact for fact in facts}, come, world.size, world.local_size, os.environ.get(HOSTS, "").split(),
        seconds))  # fmt: skip
    first = [fact for fact in facts if fact.local_rank == 0 and fact.address]
    meeting.say("roll", {"units": units, "first": [[fact.rank, fact.address, fact.port] for fact in first]})
    others = [fact.rank for fact in facts if fact.rank]
    unreached = _unreached(world, [[fact.rank, fact.address, fact.port] for fact in first])
    heard = {0: unreached, **meeting.hear("reach", 60 + REACH_SECONDS, others)}
    apart = any(heard.values())
    go = len(facts) == world.size > 1 and all(fact.measures for fact in facts) and not (apart and backend == "gloo")
    meeting.say("go", go)
    links: dict[int, Links] = {}
    stuck = False
    if go:
        own = Links()
        stuck = _measure(own, meeting, units, device)
        links = {0: own} | {rank: _links(each) for rank, each in meeting.hear("links", 15, others).items()}
    examined = Examined(facts, links, backend if world.size > 1 else "", found)
    seen = {rank: bool(each["seen"]) for rank, each in told.items() if each["seen"] is not None}
    examined.findings += _judged(examined, config, seen, path, heard if not links or stuck else {}, units)
    report(examined)
    code = exit_code(examined.findings)
    meeting.say("verdict", code)
    meeting.hear("left", 5, others)  # the store ends with this process
    return End(code, stuck)


def _judged(
    examined: Examined, config: Config | None, seen: dict[int, bool], path: str,
    unreached: dict[int, dict[str, str]], units: list[list[int]],
) -> list[Finding]:  # fmt: skip
    facts, links = examined.facts, examined.links
    places = compare.Places(facts)
    found = compare.merged(facts, places)
    if config is not None:
        cluster, slurm = config.cluster, config.slurm
        asked = cluster.devices if slurm.gpus_per_node < 0 and cluster.accelerator != "cpu" else slurm.gpus_per_node
        asked = max(asked, 0) if cluster.launcher == "slurm" else 0
        found += guarded("machine", "GPUs", lambda: compare.check_devices(
            facts, places, cluster.accelerator, cluster.devices, asked))  # fmt: skip
        found += guarded("data", "digest", lambda: compare.check_data(facts, places, config.data.digest))
    found += guarded("versions", "versions", lambda: compare.check_versions(facts, places))
    found += guarded("directory", "run directory", lambda: compare.check_directory(facts, places, seen, path))
    found += guarded("machine", "clock", lambda: compare.check_clocks(facts, places))
    found += guarded("pace", "pace", lambda: compare.check_paces(facts, places))
    found += guarded("network", "network", lambda: compare.check_reach(facts, places, unreached))
    if links:
        found += guarded("network", "network", lambda: compare.check_links(
            facts, places, links, units, examined.backend, LINK_SECONDS))  # fmt: skip
    return found


def _config(world: World, read: Callable[[], Config]) -> tuple[Facts, Config | None]:
    """The config as this rank reads it; one that it cannot read is a finding that the others hear of."""
    facts = begun(world)
    try:
        return facts, read()
    except (ConfigError, OSError) as error:
        facts.measures = False
        finding = of_message("config", error)
        facts.note(guarded("config", "config", lambda: [finding]))
        return facts, None


@contextmanager
def _token(config: Config | None) -> Iterator[dict[str, str]]:
    """A file that rank 0 leaves in the run's directory, or where that would be made, for as long as the others look."""
    nothing = {"path": "", "file": "", "token": ""}
    if config is None:
        yield nothing
        return
    place = existing(config.directory if config.run.id else Path(config.run.dir))
    file, token = place / f".doctor-{secrets.token_hex(8)}", secrets.token_hex(16)
    try:
        file.write_text(token)
    except OSError:  # that it cannot be written is a finding of its own
        yield nothing
        return
    try:
        yield {"path": str(place), "file": str(file), "token": token}
    finally:
        with suppress(OSError):
            file.unlink()


def _seen(hello: dict[str, Any]) -> bool | None:
    """Whether what rank 0 has written is here. None where it could not write."""
    if not hello["file"]:
        return None
    try:
        return Path(hello["file"]).read_text() == str(hello["token"])
    except OSError:
        return False


def _compare_clock(facts: Facts, host: str, port: int) -> None:
    try:
        facts.apart, facts.apart_error = clock_apart(host, port)
    except OSError as error:
        found = fault("clock", f"rank 0's clock cannot be asked at {host}:{port} ({error.strerror or error})",
                      "open all ports between the nodes of a job")  # fmt: skip
        facts.note(guarded("network", "clock", lambda: [found]))


def _unreached(world: World, first: list[list[Any]]) -> dict[str, str]:
    """Of the first ranks of other nodes those that this one, if it is one, cannot reach; by rank, why."""
    own = next((number for number, (rank, *_) in enumerate(first) if rank == world.rank), None)
    if own is None:
        return {}
    others = (first[own + 1 :] + first[:own])[:_NEIGHBOURS]

    def reached(other: list[Any]) -> str:
        try:
            clock_apart(other[1], other[2], REACH_SECONDS)
        except OSError as error:
            return error.strerror or str(error)
        return ""

    with ThreadPoolExecutor(max_workers=_NEIGHBOURS) as pool:
        return {str(other[0]): why for other, why in zip(others, pool.map(reached, others), strict=True) if why}


def _measure(links: Links, meeting: Meeting, units: list[list[int]], device: torch.device) -> bool:
    """Fill in `links`, as far as the time goes; True if a thread still waits."""
    world = meeting.world
    backend = backend_of(device, world)
    # NCCL's own watchdog would end the process before it can say so.
    limit = timedelta(seconds=LINK_SECONDS * (10 if backend == "nccl" else 1))

    def act() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        store = PrefixStore("links", meeting.connected(LINK_SECONDS))
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=limit)
        measure(links, units, world.rank, device)
        dist.destroy_process_group()

    try:
        within(LINK_SECONDS, act)
    except TimeoutError:
        return True
    except Exception as error:
        links.error = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        return True
    return False


def _links(content: dict[str, Any]) -> Links:
    timings = {name: content[name] and Timing(**content[name]) for name in ("statistics", "gradients")}
    pairs = {int(rank): (float(small), float(large)) for rank, (small, large) in content["pairs"].items()}
    return Links(content["phase"], pairs=pairs, error=content["error"], **timings)


def _heard(meeting: Meeting, what: str, seconds: float) -> Any:
    """What rank 0 says."""
    heard = meeting.hear(what, seconds, [0])
    if 0 not in heard:
        raise LostError(f"rank 0 at {meeting.host}:{meeting.port} has said nothing for {seconds:g} s")
    return heard[0]
