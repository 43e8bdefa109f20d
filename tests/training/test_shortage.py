"""What is said where memory ran out."""

import torch

from pipeline.training.shortage import Appetite, shortage

APPETITE = Appetite(images=64, image_size=224, width=1.0, precision="32", workers=7)


def test_too_little_memory_on_a_gpu_names_what_was_asked_for_and_what_to_lower():
    said = shortage(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), APPETITE)
    assert "out of memory on the GPU, asked for 2.00 GiB more" in said
    assert "lower data.micro_batch_size (now 64 images on a rank) to 32" in said
    assert "statistics then are those of the micro-batch" in said
    assert "trainer.precision=bf16 (now 32)" in said
    assert "\n" not in said


def test_too_little_memory_on_the_cpu_is_known_by_torchs_own_message():
    try:
        torch.empty(2**60)
    except RuntimeError as error:
        said = shortage(error, APPETITE)
    assert "out of memory" in said
    assert "asked for" in said
    assert shortage(MemoryError(), APPETITE).startswith("out of memory: lower")


def test_one_image_cannot_be_halved():
    said = shortage(MemoryError(), Appetite(1, 224, 1.0, "bf16", 0))
    assert "micro_batch_size" not in said
    assert "bf16" not in said


def test_a_killed_worker_names_the_workers_and_shared_memory_where_that_is_the_reason():
    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    assert "lower cluster.workers (now 7)" in shortage(killed, APPETITE)
    bus = RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's "
                       "workers are out of shared memory. Please try to raise your shared memory limit.")  # fmt: skip
    assert "/dev/shm is full" in shortage(bus, APPETITE)


def test_other_errors_are_not_about_memory():
    assert shortage(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), APPETITE) == ""
