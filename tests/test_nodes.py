"""What ranks have told, side by side: each planted difference is named with its node; and what ranks talk by."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.doctor import compare, nodes
from pipeline.doctor.clock import TimeServer, clock_apart
from pipeline.doctor.compare import Places
from pipeline.doctor.facts import Facts
from pipeline.doctor.findings import Finding, fault
from pipeline.doctor.links import PHASES, Links, Timing, partners, slow
from pipeline.doctor.meeting import LostError
from pipeline.launch.failure import CODE

VERSIONS = {"pipeline": "1", "Python": "3.11", "torch": "2.13.0", "lightning": "2.6.6"}


def ranks(nodes: int = 2, devices: int = 2, **same: object) -> list[Facts]:
    return [Facts(rank=node * devices + local, local_rank=local, local_size=devices, node=node, host=f"n{node}",
                  versions=dict(VERSIONS), device="H100", gpus=devices, uuid=f"GPU-{node}-{local}", apart_error=1e-4,
                  **same)  # type: ignore[arg-type]
            for node in range(nodes) for local in range(devices)]  # fmt: skip


def only(found: list[Finding]) -> Finding:
    (one,) = found
    return one


def devices(facts: list[Facts], asked: int = 2, accelerator: str = "cuda", wanted: int = 2) -> list[Finding]:
    return list(compare.check_devices(facts, Places(facts), accelerator, wanted, asked))


def test_equal_nodes_have_no_fault() -> None:
    facts = ranks()
    assert devices(facts) == []
    assert list(compare.check_versions(facts, Places(facts))) == []
    assert list(compare.check_paces(facts, Places(facts))) == []


def test_a_lost_gpu_is_named_with_its_node() -> None:
    facts = ranks()
    for fact in facts[2:]:
        fact.gpus = 1
    found = devices(facts)
    assert found[0].text == "n1: torch finds 1 GPU for cluster.devices = 2"
    assert found[0].state == "fault"
    assert "slurm.exclude" in found[0].way_out


def test_a_node_where_torch_finds_no_gpu_is_a_fault_even_where_the_accelerator_is_left_open() -> None:
    facts = ranks()
    for fact in facts[2:]:
        fact.gpus = 0
    assert only(devices(facts, accelerator="auto")).text == "n1: torch finds no GPU for cluster.devices = 2"
    assert devices(facts, accelerator="cpu") == []


def test_gpus_that_slurm_did_not_give_or_gave_twice_are_faults() -> None:
    facts = ranks(granted=2)
    facts[3].granted = 1
    assert only(devices(facts)).text == ("rank 3 on n1: 1 GPU in CUDA_VISIBLE_DEVICES, the job asked for 2 a node")
    facts = ranks()
    facts[3].uuid = facts[2].uuid
    assert only(devices(facts)).text == "n1: one GPU for all of them"


def test_gpus_that_stand_idle_and_mixed_models_and_drivers_are_warned_about() -> None:
    facts = ranks(driver="570.86")
    for fact in facts:
        fact.gpus = 8
    assert only(devices(facts, asked=0)).way_out == "cluster.devices=8"
    facts = ranks(driver="570.86")
    facts[3].device, facts[3].driver = "A100", "535.1"
    found = devices(facts)
    assert [(f.name, f.state) for f in found] == [("GPU model", "warning"), ("driver", "warning")]
    assert found[0].text == "differs: A100 on rank 3 on n1; the others H100"


def test_versions_and_data_sets_that_differ_are_faults() -> None:
    facts = ranks(digest="a" * 64, regions=True)
    facts[2].versions["torch"] = facts[3].versions["torch"] = "2.11.0"
    facts[3].regions = False
    found = list(compare.check_versions(facts, Places(facts)))
    assert [f.text for f in found] == [
        "versions differ: 2.11.0 on n1; the others 2.13.0",
        "differs, and images with it: missing on rank 3 on n1; the others there",
    ]
    facts[2].digest = facts[3].digest = "b" * 64
    assert only(list(compare.check_data(facts, Places(facts), ""))).text == (
        "nodes hold different data sets: bbbbbbbbbbbb on n1; the others aaaaaaaaaaaa"
    )
    assert list(compare.check_data(facts, Places(facts), "a" * 64)) == []  # which each node has said for itself


@pytest.mark.parametrize(("apart", "state"), [(0.001, "ok"), (-3.0, "warning"), (31.0, "fault"), (-31.0, "fault")])
def test_a_clock_is_judged_by_how_far_it_is_off(apart: float, state: str) -> None:
    facts = ranks()
    facts[0].apart_error = -1  # rank 0 has nobody to ask
    for fact in facts[2:]:
        fact.apart = apart
    found = only(list(compare.check_clocks(facts, Places(facts))))
    assert found.state == state
    if state != "ok":
        side = "ahead of" if apart > 0 else "behind"
        assert found.text == f"n1: {abs(apart):.1f} s {side} rank 0 on n0"


def test_a_clock_that_could_be_right_within_the_error_is_no_fault() -> None:
    facts = ranks()
    for fact in facts[2:]:
        fact.apart, fact.apart_error = 31.0, 40.0  # measured over a line that took 80 s
    assert only(list(compare.check_clocks(facts, Places(facts)))).state == "ok"


def test_slow_cores_and_a_throttled_gpu_are_named() -> None:
    facts = ranks(decoded=100.0, flops=700e12)
    facts[1].decoded, facts[3].flops = 40.0, 500e12
    found = list(compare.check_paces(facts, Places(facts)))
    assert [f.text for f in found] == [
        "rank 1 on n0: 40 images/s a core, the middle rank 100",
        "rank 3 on n1: 500 TFLOP/s, the middle rank 700",
    ]
    assert {f.state for f in found} == {"warning"}


def test_who_has_not_come_or_has_not_spoken_is_named_by_its_node() -> None:
    facts = {fact.rank: fact for fact in ranks()[:1]}
    come = {0: "n0", 1: "n0"}
    found = list(compare.check_presence(facts, come, 6, 2, ["n0", "n1"], 120))
    assert [f.text for f in found] == [
        "ranks 2, 3 on n1 did not come within 120 s",
        "ranks 4, 5 on node 2 did not come within 120 s",
        "rank 1 on n0 came, and has not said what it sees within 120 s",
    ]
    assert all(f.state == "fault" and f.way_out for f in found)


def test_what_a_node_lacks_is_said_once_for_all_of_its_ranks() -> None:
    facts = ranks(nodes=3)
    for fact in (facts[2], facts[4]):  # the first ranks of two nodes
        fact.note([fault("shards", "/data lacks a.tar", "bring it")])
    found = only(compare.merged(facts, Places(facts)))
    assert found.text == "n1, n2: /data lacks a.tar"


def linked(pairs: dict[int, dict[int, float]]) -> dict[int, Links]:
    timing = Timing(8192, 1e-4, 2e-4, 20)
    return {rank: Links(PHASES[-1], timing, Timing(25_000_000, 0.01, 0.02, 20),
                        {other: (seconds, 10 * seconds) for other, seconds in each.items()})
            for rank, each in pairs.items()}  # fmt: skip


def test_a_slow_link_is_named_by_its_best_partner_and_no_partner_of_it() -> None:
    facts = ranks(nodes=4, devices=1)
    fast, late = 1e-4, 0.02
    pairs = {a: {b: late if 2 in (a, b) else fast for b in range(4) if b != a} for a in range(4)}
    units = compare.units_of(facts)
    found = list(compare.check_links(facts, Places(facts), linked(pairs), units, "gloo", 60))
    slow_ones = [f for f in found if f.name == "slow link"]
    assert only(slow_ones).text.startswith("n2: 8,192 bytes take 20 ms with its best partner, 100 us elsewhere")
    assert [f.state for f in found if f.name != "slow link"] == ["ok", "ok"]


def test_a_link_that_is_slow_one_way_is_named_though_its_own_end_does_not_notice() -> None:
    facts = ranks(nodes=4, devices=1)
    pairs = {a: {b: 0.02 if b == 2 else 1e-4 for b in range(4) if b != a} for a in range(4)}
    found = compare.check_links(facts, Places(facts), linked(pairs), compare.units_of(facts), "gloo", 60)
    assert [f.text.partition(":")[0] for f in found if f.name == "slow link"] == ["n2"]


def test_of_two_nodes_none_is_blamed_for_the_link_between_them() -> None:
    assert slow({0: {1: 5.0}, 1: {0: 5.0}}, [[0], [1]]) == []


def test_who_stayed_behind_in_a_collective_is_named() -> None:
    facts = ranks()
    links = {
        0: Links("gradients", error="no end"),
        1: Links("gradients"),
        2: Links("gradients"),
        3: Links("statistics"),
    }
    found = only(list(compare.check_links(facts, Places(facts), links, compare.units_of(facts), "nccl", 60)))
    assert found.text == "nccl: rank 3 on n1 did not get beyond the statistics, and the others wait (no end)"
    links = {rank: Links("connection") for rank in range(4)}
    found = only(list(compare.check_links(facts, Places(facts), links, compare.units_of(facts), "nccl", 60)))
    assert found.text == "nccl: no rank got beyond the connection (no end within 60 s)"
    del links[3]
    found = only(list(compare.check_links(facts, Places(facts), links, compare.units_of(facts), "nccl", 60)))
    assert found.text.startswith("nccl: rank 3 on n1 did not get beyond")


def test_infiniband_that_is_not_taken_is_warned_about() -> None:
    facts = ranks(infiniband=["mlx5_0"])
    links = linked({rank: {} for rank in range(4)})
    for link in links.values():
        link.gradients = Timing(25_000_000, 0.1, 0.1, 20)  # 0.4 GB/s
    found = [f for f in compare.check_links(facts, Places(facts), links, compare.units_of(facts), "nccl", 60)
             if f.name == "InfiniBand"]  # fmt: skip
    assert "as over sockets" in only(found).text
    facts[2].infiniband, facts[3].infiniband = [], []
    found = [f for f in compare.check_links(facts, Places(facts), links, compare.units_of(facts), "nccl", 60)
             if f.name == "InfiniBand"]  # fmt: skip
    assert only(found).text.startswith("only n0 with an adapter")


@pytest.mark.parametrize("count", [2, 3, 5, 8, 11])
def test_in_each_round_pairs_agree_and_nobody_is_met_twice(count: int) -> None:
    units = [[2 * node, 2 * node + 1] for node in range(count)]
    met = {rank: partners(units, rank) for rank in range(2 * count)}
    for rank, others in met.items():
        assert len(set(others)) == len(others) >= min(5, count - 1)
        assert all(rank in met[other] and other % 2 == rank % 2 and other // 2 != rank // 2 for other in others)


def test_a_unit_with_fewer_ranks_leaves_some_without_a_partner() -> None:
    assert partners([[0, 1], [2]], 1) == []
    assert partners([[0, 1], [2]], 0) == [2]


def test_a_clock_is_compared_to_half_an_exchange(monkeypatch) -> None:
    server = TimeServer()
    try:
        apart = clock_apart("127.0.0.1", server.port)
        assert abs(apart.seconds) <= apart.error < 1
    finally:
        server.close()
    with pytest.raises(OSError, match="refused"):
        clock_apart("127.0.0.1", server.port)


SMALL = ["recipe=bn_x5", "data=folder", "data.global_batch_size=24", "data.image_size=16", "cluster.accelerator=cpu"]


def test_two_ranks_of_this_machine_look_and_leave_nothing(shards: Path, tmp_path: Path) -> None:
    words = ["doctor", "--nodes", "--json", *SMALL, f"data.root={shards}", "cluster.devices=2", f"run.dir={tmp_path}"]
    done = subprocess.run([sys.executable, "-m", "pipeline", *words], capture_output=True, text=True, timeout=280,
                          cwd=tmp_path, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["verdict"], report["schema"], len(report["ranks"])) == ("go", 1, 2)
    assert report["network"]["statistics"]["bytes"] == 8192
    assert set(report["network"]["pairs"]) == {"0", "1"}
    assert list(tmp_path.iterdir()) == []


def test_several_nodes_cannot_be_started_from_one(capsys) -> None:
    assert cli.main(["doctor", "--nodes", *SMALL, "cluster.nodes=2"]) == 2
    assert "one machine cannot start several; start torchrun on every node" in capsys.readouterr().err


def test_without_sbatch_a_job_of_nodes_is_refused_with_the_way_out(capsys, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli.main(["doctor", "--nodes", *SMALL, "cluster=slurm_1x8"]) == 1
    assert "sbatch is not found: look at the nodes from where Slurm's commands are" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [
    (LostError("rank 0 at dragonet:1 has gone (reset)", gone=True), 75),
    (LostError("rank 0 does not answer at dragonet:1 (refused)"), 2),  # whatever its host is called
    (RuntimeError("of ours"), 1),  # before the others leave 75, with which the job would start again and again
])  # fmt: skip
def test_whatever_ends_a_rank_it_leaves_its_code(error, code, tmp_path: Path, monkeypatch) -> None:
    def ends(*_: object) -> None:
        raise error

    monkeypatch.setattr(nodes, "take_part", ends)
    monkeypatch.setenv(CODE, str(tmp_path / "code"))
    monkeypatch.setenv("RANK", "0")
    with contextlib.suppress(RuntimeError):
        assert cli.main(["doctor", "--nodes", "config.yaml"]) == 0
    assert (tmp_path / "code").read_text() == str(code)


def test_ctrl_c_does_not_wait_for_ranks_that_have_not_come(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    (tmp_path / "config.yaml").write_text("schema: 1\ncluster: {devices: 2}\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "doctor", "--nodes", str(tmp_path / "config.yaml")], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    try:
        while not listens(port):
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=100)
        assert time.monotonic() - began < 100  # of the 120 s that rank 1 may take to come
    finally:
        process.kill()
    assert process.returncode == 1
    assert said.strip().endswith("pipeline: interrupted")


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
