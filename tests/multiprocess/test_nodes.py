"""Ranks that look before the first step: a planted fault is found where it is, by name, and all end with one code."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Config, compose_config
from pipeline.data.shards import read_manifest
from pipeline.doctor import facts, links, nodes, ranks
from pipeline.doctor.findings import Finding
from pipeline.doctor.meeting import LostError
from pipeline.doctor.nodes import End, Examined, take_part
from pipeline.world import World
from tests.multiprocess.ranks import run_ranks

SMALL = ("recipe=bn_x5", "data=folder", "data.global_batch_size=24", "data.image_size=16", "cluster.accelerator=cpu",
         "cluster.devices=1", "trainer.threads=1", "run.id=a")  # fmt: skip
Told = tuple[End, Examined | None, list[str]]


def clock_100_s_ahead() -> None:
    real = time.time
    time.time = lambda: real() + 100


def clock_100_s_behind() -> None:
    real = time.time
    time.time = lambda: real() - 100


def other_versions() -> None:
    facts.installed_version = lambda name: "2.11.0"


def no_extension() -> None:
    facts.REGIONS = "not there"


def another_run_directory() -> None:
    nodes._seen = lambda hello: False


def sleep_before_the_measure() -> None:
    nodes.measure = lambda *_: time.sleep(100)


def fail_in_the_measure() -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("NCCL error: unhandled system error\nand more")

    nodes.measure = broken


def slow_link() -> None:
    real = links._exchange

    def slowed(*arguments: Any) -> Callable[[], None]:
        exchange = real(*arguments)

        def late() -> None:
            time.sleep(0.03)
            exchange()

        return late

    links._exchange = slowed


def slow_cores() -> None:
    real = facts.Augmentation.crop

    def crop(self: Any, payload: bytes, key: int) -> Any:
        time.sleep(0.05)
        return real(self, payload, key)

    facts.Augmentation.crop = crop


def silent_address() -> None:
    real = facts.look

    def look(found: facts.Facts, *arguments: Any) -> None:
        real(found, *arguments)
        found.port = 1  # nobody listens there

    nodes.look = look


def rank(
    rank: int, world: int, words: Sequence[Sequence[str]], sabotage: dict[int, str], seconds: float
) -> Told | None:
    """One rank on a node of its own. words: of each rank."""
    nodes.LINK_SECONDS, nodes.REACH_SECONDS, facts.DECODE_SECONDS = 6.0, 0.5, 0.1
    links.GRADIENT_BYTES = 1_000_000
    fault = sabotage.get(rank)
    if fault == "absent":
        return None
    if fault:
        globals()[fault]()
    reports: list[Examined] = []

    def read() -> Config:
        return compose_config([*SMALL, f"cluster.nodes={world}", *words[rank]])

    os.environ["PIPELINE_HOSTS"] = " ".join(f"n{node}" for node in range(world))
    place = World(rank, world, 0, 1, rank)
    end = take_part(place, "127.0.0.1", int(os.environ["MASTER_PORT"]), read, reports.append, seconds)
    return end, reports[0] if reports else None, ranks.table(reports[0]) if reports else []


def looked(
    shards: Path, sabotage: dict[int, str] | None = None, *, world: int = 2,
    more: dict[int, Sequence[str]] | None = None, seconds: float = 20,
) -> Examined:  # fmt: skip
    """What rank 0 knows in the end, after all that came have ended with its code."""
    words = [[f"data.root={shards}", *(more or {}).get(rank, ())] for rank in range(world)]
    told = [each for each in run_ranks(world, rank, words, sabotage or {}, seconds, seconds=90) if each is not None]
    assert len({end.code for end, *_ in told}) == 1, told
    examined = told[0][1]
    assert examined is not None
    examined.findings.append(Finding("code", "ok", str(told[0][0].code)))
    return examined


def faults(examined: Examined) -> list[Finding]:
    return [finding for finding in examined.findings if finding.state == "fault"]


def code(examined: Examined) -> int:
    return int(examined.findings[-1].text)


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_healthy_ranks_go_and_leave_nothing_behind(shards: Path, tmp_path: Path) -> None:
    run = (f"run.dir={tmp_path}",)
    examined = looked(shards, world=3, more=dict.fromkeys(range(3), run))
    assert faults(examined) == []
    assert code(examined) == 0
    assert [fact.rank for fact in examined.facts] == [0, 1, 2]
    assert {fact.digest for fact in examined.facts} == {read_manifest(shards).digest}
    assert all(fact.decoded > 0 and fact.shared_memory > 0 for fact in examined.facts)
    assert all(0 <= abs(fact.apart) <= fact.apart_error + 0.1 for fact in examined.facts[1:])
    assert {link.phase for link in examined.links.values()} == {"end"}
    assert set(examined.links[0].pairs) == {1, 2}
    assert {f.name for f in examined.findings} >= {"ranks", "clock", "run directory", "statistics", "gradients"}
    assert list(tmp_path.iterdir()) == []


PLANTED = [
    # what is planted on rank 1 of 2, code, and what is said of it
    ("clock_100_s_ahead", 2, "clock", "(node 1): 100.0 s ahead of rank 0 on"),
    ("clock_100_s_behind", 2, "clock", "(node 1): 100.0 s behind rank 0 on"),
    ("other_versions", 2, "torch", "versions differ: 2.11.0 on"),
    ("no_extension", 2, "JPEG extension", "missing on"),
    ("another_run_directory", 2, "run directory", "(node 1): what rank 0 wrote into"),
    ("sleep_before_the_measure", 2, "network", "(node 1) did not get beyond the connection, and the others wait"),
    ("fail_in_the_measure", 2, "network", "(node 1) did not get beyond the connection, and the others wait"),
    ("silent_address", 2, "network", "(node 1) at"),
]


@pytest.mark.parametrize(("sabotage", "wanted", "name", "said"), PLANTED, ids=[case[0] for case in PLANTED])
def test_a_planted_fault_is_named_with_its_node(shards, sabotage, wanted, name, said) -> None:
    examined = looked(shards, {1: sabotage})
    assert [f for f in faults(examined) if f.name == name and said in f.text and f.way_out], examined.findings
    assert {f.name for f in faults(examined)} == {name} | ({"lightning"} if name == "torch" else set())
    assert code(examined) == wanted


def test_a_node_without_the_shards_is_named_and_all_faults_are_shown(shards, tmp_path) -> None:
    lacking = tmp_path / "lacking"
    lacking.mkdir()
    for path in shards.iterdir():
        if path.name != "train-000001.tar":
            (lacking / path.name).symlink_to(path)
    more = {1: ["data.root=/nowhere"], 2: [f"data.root={lacking}"]}
    examined = looked(shards, world=3, more=more)
    texts = [f.text for f in faults(examined)]
    assert any(text.endswith("(node 1): data.root = /nowhere does not exist") for text in texts)
    assert any("(node 2)" in text and "lacks train-000001.tar" in text for text in texts)
    assert len(texts) == 2
    assert code(examined) == 3
    assert {link.phase for link in examined.links.values()} == {"end"}  # the network was measured all the same


def test_a_cache_whose_variable_a_node_lacks_is_one_fault_and_none_where_no_shard_goes_there(shards) -> None:
    cache = "data.cache=$PIPELINE_NOWHERE/cache"
    examined = looked(shards, more={1: [cache, "data.stage=true"]})
    (found,) = faults(examined)
    assert "(node 1): data.cache = $PIPELINE_NOWHERE/cache: PIPELINE_NOWHERE is not set on this node" in found.text
    assert found.way_out == "set what is missing, or name the directory without it"
    assert code(examined) == 3
    assert faults(looked(shards, more={0: [cache], 1: [cache]})) == []


def test_a_rank_that_never_comes_is_named_within_its_time(shards) -> None:
    examined = looked(shards, {2: "absent"}, world=3, seconds=4)
    (found,) = faults(examined)
    assert found.text == "rank 2 on n2 did not come within 4 s"
    assert [fact.rank for fact in examined.facts] == [0, 1]  # and are shown
    assert code(examined) == 2


def test_ranks_without_rank_0_say_so_within_their_time() -> None:
    world = World(1, 2, 0, 1, 1)
    began = time.monotonic()
    with pytest.raises(LostError, match=r"rank 0 does not answer at 127\.0\.0\.1:9"):
        take_part(world, "127.0.0.1", 9, lambda: compose_config(SMALL), lambda examined: None, 1.5)
    assert time.monotonic() - began < 10


def test_a_config_that_one_rank_cannot_read_is_a_finding_of_its_node(shards) -> None:
    examined = looked(shards, more={1: ["norm.group_size=3"]})
    (found,) = faults(examined)
    assert "(node 1): norm.group_size = 3 does not divide the world of 2" in found.text
    assert code(examined) == 2


def test_a_rank_whose_link_is_slow_is_named_though_its_partners_wait_too(shards) -> None:
    examined = looked(shards, {1: "slow_link"}, world=3)
    (found,) = [f for f in examined.findings if f.name == "slow link"]
    assert "(node 1): 8,192 bytes take" in found.text
    assert code(examined) == 0  # slow is no fault


def test_a_rank_whose_cores_are_slow_is_named(shards) -> None:
    examined = looked(shards, {1: "slow_cores"}, world=3)
    (found,) = [f for f in examined.findings if f.name == "decoding"]
    assert "(node 1): " in found.text
    assert "images/s a core" in found.text
