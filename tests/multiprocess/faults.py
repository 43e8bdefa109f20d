"""Faults for real runs: a rank that is started with FAULT=what:step does that at this step. Imported first of all."""

import ctypes
import functools
import os
import signal
import time
from pathlib import Path

import torch

from pipeline.data.images import Images
from pipeline.training.classifier import Classifier


def at_step(wanted: int, fault):
    """Do it in the training step of this number."""
    step_of = Classifier.training_step

    @functools.wraps(step_of)
    def step(self, batch, number):
        loss = step_of(self, batch, number)
        return fault(loss) if self.trainer.global_step + 1 == wanted and loss is not None else loss

    Classifier.training_step = step


def in_reading(wanted: int, fault) -> None:
    """Do it when so many images have been read."""
    load, count = Images.load_or_substitute, 0

    def loaded(self, *arguments, **options):
        nonlocal count
        count += 1
        if count == wanted:
            fault()
        return load(self, *arguments, **options)

    Images.load_or_substitute = loaded


def sleep_in_forward(loss):
    time.sleep(10_000)
    return loss


def sleep_in_backward(loss):
    loss.register_hook(lambda gradient: time.sleep(10_000))
    return loss


def keep_the_lock(loss):
    ctypes.PyDLL(None).sleep(10_000)  # C code that never gives Python's lock back
    return loss


def slow(loss):
    time.sleep(5)
    return loss


def die(loss):
    os.kill(os.getpid(), signal.SIGKILL)
    return loss


def segfault(loss):
    ctypes.string_at(0)
    return loss


def no_number(loss):
    return loss * torch.nan


def spike(loss):
    return loss * 100


def fat(loss):
    return loss + torch.empty(2**55).sum()


def full(loss):
    """The disk is full, for what this rank appends to its ledger."""
    (path,) = Path.cwd().glob(f"*/ledger/rank-{os.environ['RANK']}.jsonl")
    path.unlink()
    path.symlink_to("/dev/full")
    return loss


def install(what: str, step: int) -> None:
    if what == "sleep_in_loading":
        in_reading(step, lambda: time.sleep(10_000))
    else:
        at_step(step, globals()[what])


if os.environ.get("FAULT") and os.environ.get("RANK", "0") == os.environ.get("FAULTY_RANK", "1"):
    install(*[kind(word) for kind, word in zip((str, int), os.environ["FAULT"].split(":"), strict=True)])
