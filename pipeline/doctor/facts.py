"""What one rank of a job sees from where it stands: its device, its node, its data, its clock. It compares nothing.

What is a fault here whatever the others see goes with it as findings. What a node's ranks share, the first of them
looks at.
"""

from __future__ import annotations

import io
import os
import platform
import re
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline import __version__
from pipeline.config import Config
from pipeline.data.augment import Augmentation
from pipeline.data.batch import micro_batches
from pipeline.data.dataset import Dataset, Location, awaiting_index
from pipeline.data.decode import DECODER, REGIONS
from pipeline.data.policy import Policy
from pipeline.data.shards import DataError
from pipeline.data.stream import ShardStream
from pipeline.doctor import machine, network
from pipeline.doctor.findings import Finding, fault, guarded, of_message, warning
from pipeline.doctor.presence import NotYet, check_digest, check_shards, opened
from pipeline.doctor.versions import check_decoder, installed_version
from pipeline.launch.plan import worker_count
from pipeline.world import SLURM, World

DECODE_SECONDS = 0.5
# Findings that each rank has for itself; what else there is, the first rank of a node says for all.
OF_RANK = ("config", "look", "write", "images", "processors", "GPU")
_IMAGES = 16  # of the data set that are decoded, in turns
_SIDE = 4096  # of the matrices by which a GPU's pace is known
_DRIVER = re.compile(r"\s(\d{3}\.\d+(?:\.\d+)?)\s")


@dataclass(slots=True)
class Facts:
    """One rank. Sizes in bytes, paces a second, -1 and "" where nothing is known; it travels as JSON."""

    rank: int
    local_rank: int
    local_size: int
    node: int
    host: str
    device: str = "cpu"  # the model of its GPU
    memory: int = -1  # of the GPU, or of the machine as far as processes may have it
    capability: str = ""
    driver: str = ""
    uuid: str = ""  # of the GPU: no two ranks may have the same
    gpus: int = 0  # that torch finds
    granted: int = -1  # GPUs that the job was given here, by CUDA_VISIBLE_DEVICES; -1 = it says nothing
    flops: float = -1  # of the GPU, in bfloat16
    cores: float = 0
    shared_memory: int = -1
    versions: dict[str, str] = field(default_factory=dict)
    regions: bool = False  # the extension that decodes regions of JPEGs is there
    digest: str = ""  # of the data set
    decoded: float = -1  # images a second of one core, while all ranks do the same
    cache: str = ""
    cache_free: int = -1
    address: str = ""  # by which gloo and NCCL of other nodes would find this one
    port: int = 0  # of its clock
    interface: str = ""  # that leads to rank 0
    default: str = ""  # interface of the default route
    infiniband: list[str] = field(default_factory=list)
    apart: float = 0.0  # seconds that its clock is ahead of rank 0's
    apart_error: float = -1  # give or take; -1 = not measured
    measures: bool = True  # it has a config, and can take part in measuring the network
    findings: list[dict[str, str]] = field(default_factory=list)

    @property
    def found(self) -> list[Finding]:
        return [Finding(**finding) for finding in self.findings]

    def note(self, findings: list[Finding]) -> None:
        """Keep what is not in order."""
        self.findings += [asdict(finding) for finding in findings if finding.state != "ok"]


def host_name() -> str:
    return socket.gethostname().partition(".")[0]


def begun(world: World) -> Facts:
    """What a rank can say before it has a config."""
    facts = Facts(world.rank, world.local_rank, world.local_size, world.node, host_name())
    facts.versions = {"pipeline": __version__, "Python": ".".join(platform.python_version_tuple()[:2])}
    facts.versions |= {name: installed_version(name) or "none" for name in ("torch", "lightning")}
    facts.regions = DECODER == REGIONS
    facts.cores = machine.available_cores()
    with suppress(OSError):
        status = os.statvfs("/dev/shm")  # noqa: S108
        facts.shared_memory = status.f_blocks * status.f_frsize
    return facts


def look(facts: Facts, config: Config, host: str) -> None:
    """Fill in what the config asks for. host: of rank 0."""
    facts.note(guarded("nodes", "look", lambda: _look(facts, config, host)))


def _look(facts: Facts, config: Config, host: str) -> list[Finding]:
    _see_devices(facts, os.environ)
    _see_network(facts, config, host)
    facts.note(guarded("machine", "machine", lambda: _check_machine(facts, config)))
    facts.note(guarded("directory", "write", lambda: _check_directory(config)))
    facts.note(guarded("versions", "JPEG extension", lambda: check_decoder(config.data.decoder, facts.regions)))
    dataset: list[Dataset] = []
    facts.note(guarded("data", "root", lambda: _check_data(facts, config, dataset)))
    facts.note(guarded("data", "cache", lambda: _check_cache(facts, config)))
    if any(finding["section"] == "data" and finding["state"] == "fault" for finding in facts.findings):
        dataset.clear()  # what is said of it is enough
    facts.note(guarded("data", "decoding", lambda: _time_decoding(facts, config, dataset)))
    if facts.local_rank:
        facts.findings = [finding for finding in facts.findings if finding["name"] in OF_RANK]
    return []


def device_of(config: Config, world: World) -> torch.device:
    """As run/assembly.py gives it to the rank."""
    if config.cluster.accelerator != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", world.local_rank % torch.cuda.device_count())
    return torch.device("cpu")


def backend_of(device: torch.device, world: World) -> str:
    """NCCL refuses two ranks on one device."""
    return "nccl" if device.type == "cuda" and world.local_size <= torch.cuda.device_count() else "gloo"


def _see_devices(facts: Facts, environment: Mapping[str, str]) -> None:
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        facts.granted = len([name for name in visible.split(",") if name.strip() not in ("", "-1", "NoDevFiles")])
    with suppress(OSError):
        found = _DRIVER.search(Path("/proc/driver/nvidia/version").read_text())
        facts.driver = found[1] if found else ""
    with suppress(OSError):
        facts.memory = machine.available_memory()
    facts.gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0


def see_gpu(facts: Facts, device: torch.device) -> list[Finding]:
    """The GPU that the rank trains on, and what it computes in a tenth of a second; finds nothing."""
    properties = torch.cuda.get_device_properties(device)
    facts.device, facts.memory = properties.name, properties.total_memory
    facts.capability = f"{properties.major}.{properties.minor}"
    facts.uuid = str(getattr(properties, "uuid", ""))
    a = torch.ones(_SIDE, _SIDE, dtype=torch.bfloat16, device=device)
    for _ in range(3):
        a @ a
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(20):
        a @ a
    torch.cuda.synchronize(device)
    facts.flops = 20 * 2 * _SIDE**3 / (time.perf_counter() - began)
    return []


def _see_network(facts: Facts, config: Config, host: str) -> None:
    """Interfaces, and the address that this node would be found by."""
    name, environment, up = socket.gethostname(), os.environ, network.interfaces()
    chosen = environment.get("GLOO_SOCKET_IFNAME", "")
    # Who is told to find rank 0 on the loopback is on the same machine.
    nodes = 1 if network.address_of(host).startswith("127.") else config.cluster.nodes
    own = network.address_of(name)
    facts.infiniband, facts.default = network.infiniband(), network.default_interface()
    facts.interface = network.interface_towards(host, up)
    facts.address = next((i.address for i in up if chosen and i.name in chosen.split(",") and i.address), own)
    facts.note(guarded("network", "host name", lambda: network.check_host(name, nodes, chosen=chosen)))
    facts.note(guarded("network", "network", lambda: network.check_network(
        up, nodes, own, facts.infiniband, environment, default=facts.default, towards=facts.interface)))  # fmt: skip


def _check_machine(facts: Facts, config: Config) -> Iterator[Finding]:
    """Memory, shared memory, open files and cores. A task of srun may have been given cores of its own."""
    devices, workers = facts.local_size, worker_count(config, cuda=facts.gpus > 0)
    data = config.data
    pieces = micro_batches(data.global_batch_size, config.world, data.micro_batch_size)
    share = -(-data.global_batch_size // (pieces * config.world)) * 3 * data.image_size**2
    if facts.local_rank == 0:
        yield from machine.check_shared_memory(devices, workers, share, facts.gpus)
        yield from machine.check_open_files(machine.open_files(), 256, workers)
        yield from machine.check_memory(machine.available_memory(), devices, workers)
        yield from machine.check_temporary(os.environ)
    own = os.environ.get(SLURM) == "srun" and facts.cores < (os.cpu_count() or 1)
    if own or facts.local_rank == 0:
        cuda = config.cluster.accelerator != "cpu" and facts.gpus > 0
        yield from machine.check_processors(
            facts.cores, 1 if own else devices, config.trainer.threads or 1, workers, cuda
        )


def _check_directory(config: Config) -> Iterator[Finding]:
    """A real file where the run writes."""
    place = machine.existing(config.directory if config.run.id else Path(config.run.dir))
    try:
        with tempfile.TemporaryFile(prefix=".doctor-", dir=place) as file:
            file.write(bytes(1024))
    except OSError as error:
        yield fault("write", f"run.dir: {place} cannot be written: {error.strerror}",
                    "choose a directory that all nodes can write: run.dir")  # fmt: skip


def _check_data(facts: Facts, config: Config, dataset: list[Dataset]) -> Iterator[Finding]:
    """The data set, if it is there: its digest, and every shard in its size. Reads no shard."""
    data, location = config.data, Location(*config.data.location)
    root = Path(location.root)
    if location.is_cached and location.unset_variables:
        return  # the cache's own fault
    if not location.is_remote and not root.exists():
        if data.source and not data.digest:
            yield warning("shards", f"data.root = {data.root} is made at the first start: no shard was looked at",
                          "start it once, or `pipeline shards write`")  # fmt: skip
        else:
            yield fault("shards", f"data.root = {data.root} does not exist",
                        "bring the shards to every node, or give a directory that all nodes see")  # fmt: skip
        return
    try:
        if awaiting_index(location):
            raise NotYet
        dataset.append(opened(location))
    except NotYet:
        yield warning("shards", f"data.root = {data.root} is indexed at the first start: no shard was looked at",
                      f"pipeline shards index {data.root}")  # fmt: skip
        return
    except DataError as error:
        yield of_message("shards", error)
        return
    except TimeoutError as error:
        yield fault("shards", f"data.root = {data.root} cannot be opened: {error}", "see the file system, or the "
                    "server, the network and credentials (AWS_*, GOOGLE_*)")  # fmt: skip
        return
    facts.digest = dataset[0].manifest.digest
    yield from check_digest(data.digest, dataset[0].manifest, "its digest differs", data.root)
    if facts.local_rank == 0:
        yield from check_shards(dataset[0], seconds=0)


def _check_cache(facts: Facts, config: Config) -> Iterator[Finding]:
    location = Location(*config.data.location)
    if location.unset_variables:
        if location.is_cached:  # else nothing of the run's goes there
            yield of_message("cache", location.unset_variables)
        return
    place = location.cache_directory
    facts.cache = str(place)
    there = machine.existing(place)
    with suppress(OSError):
        status = os.statvfs(there)
        facts.cache_free = status.f_bavail * status.f_frsize
    if not location.is_remote:
        return
    try:
        with tempfile.TemporaryFile(prefix=".doctor-", dir=there) as file:
            file.write(bytes(1024))
    except OSError as error:
        yield fault("cache", f"data.cache: {there} cannot be written: {error.strerror}, and shards come from "
                    f"{location.root}", "give a directory on each node: data.cache")  # fmt: skip


def _time_decoding(facts: Facts, config: Config, dataset: list[Dataset]) -> Iterator[Finding]:
    """Training crops of images of the data set, or of one made here where that lies on a server."""
    augment, data = config.augment, config.data
    policy = Policy(augment.operations, augment.magnitude, augment.magnitude_spread) if augment.operations else None
    crop = Augmentation(data.image_size, augment.area_min, augment.flip, augment.photometric, policy=policy).crop
    try:
        payloads = _payloads(dataset[0], data.num_classes) if dataset else []
    except (DataError, ValueError) as error:
        yield of_message("images", error)
        return
    payloads = payloads or [_drawn()]
    number, began = 0, time.perf_counter()
    while number < 3 or time.perf_counter() - began < DECODE_SECONDS:
        crop(payloads[number % len(payloads)], number)
        number += 1
    facts.decoded = number / (time.perf_counter() - began)


def _payloads(dataset: Dataset, num_classes: int) -> list[bytes]:
    """Bytes of a few images, each of which is compared with its hash."""
    if dataset.cache is not None or not dataset.manifest.splits.get("train"):
        return []
    split = dataset.split("train", num_classes)
    stream = ShardStream(dataset, split, keep=4)
    places = np.linspace(0, len(split) - 1, min(_IMAGES, len(split))).astype(int)
    try:
        return [stream.read(int(place)) for place in places]
    finally:
        stream.close()


def _drawn() -> bytes:
    """A photograph's size in smooth noise, as JPEG."""
    coarse = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((500, 375)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
