"""Weights & Biases: what a start would find. The key is looked for and never shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pipeline.callbacks.wandb_server import ServerError
from pipeline.doctor.findings import Finding, fault, of_message, ok, warning
from pipeline.launch.patience import within

_KEY = "set WANDB_API_KEY, or run `wandb login`, or choose tracking.mode=offline"


def check_tracking(mode: str, has_key: bool, ask: Callable[[], object], seconds: float = 5.0) -> Iterator[Finding]:
    """Whether rows reach W&B. ask: what a start asks its server; raises ServerError."""
    if mode == "disabled":
        yield ok("W&B", "disabled; metrics.csv has every row")
        return
    if mode == "offline":
        yield ok("W&B", "offline; upload with `pipeline sync RUN` from where there is a network")
        return
    if not has_key:
        if mode == "online":
            yield fault("W&B", "tracking.mode = online, and there is no key", _KEY)
        else:
            yield warning("W&B", "there is no key: tracking.mode = auto falls back to offline", _KEY)
        return
    try:
        within(seconds, ask)
    except (ServerError, TimeoutError) as error:
        said = of_message("W&B", error)
        text = f"a key is there, and the server cannot be had ({said.text})"
        remedy = (said.way_out if isinstance(error, ServerError) and "; " in str(error)
                  else "see WANDB_BASE_URL, proxies and firewalls, or choose tracking.mode=offline")  # fmt: skip
        if mode == "online":
            yield fault("W&B", text, remedy)
        else:
            yield warning("W&B", f"{text}: a start waits for it, and tracks offline", remedy)
    else:
        yield ok("W&B", "online: a key is there, and the server knows it")
