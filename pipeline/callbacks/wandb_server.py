"""W&B's server, asked by ourselves: one question, its answer within so many seconds, or a line that says why not.

W&B's client asks without a limit of time where it does not send, and follows redirects with the key.
"""

from __future__ import annotations

import base64
import http.client
import json
import netrc
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import wandb

# What wandb-core asks when it resumes a run; historyTail is the last line of the history.
_QUERY = """query RunResumeStatus($project: String, $entity: String, $name: String!) {
  model(name: $project, entityName: $entity) { bucket(name: $name, missingOk: true) { historyTail } }
}"""
T = TypeVar("T")


class ServerError(Exception):
    """The W&B server cannot be asked; the message says why, in one line and without a key."""


@dataclass(frozen=True, slots=True)
class WandbPlace:
    """Where a run belongs in W&B. id: kept in run.json, so that a resumed run goes on in the same place.

    sweep: the id of the one that gave it its parameters. returns: an interrupted run goes on by itself in its own job,
    and W&B must not hand it to the sweep's next agent, as it does with one that says that it is preempted.
    """

    id: str
    name: str
    project: str
    entity: str | None
    group: str | None
    tags: Sequence[str]
    sweep: str | None = None
    returns: bool = False

    @property
    def where(self) -> str:
        """Of the run among all others of its server."""
        return f"{self.entity or ''}/{self.project}/{self.id}"


def last_position_on_server(place: WandbPlace, *, seconds: float) -> int:
    """How far the history on the server reaches, -1 for nothing. Raises ServerError."""
    variables = {"project": place.project, "entity": place.entity or own_entity(), "name": place.id}
    bucket = (asked("RunResumeStatus", _QUERY, variables, seconds=seconds).get("model") or {}).get("bucket") or {}

    def read() -> int:
        tail = json.loads(bucket.get("historyTail") or "[]")
        return int(json.loads(tail[-1])["_step"]) if tail else -1

    return understood(read)


def asked(operation: str, query: str, variables: dict[str, Any], *, seconds: float) -> dict[str, Any]:
    """What the server answers to a question of GraphQL. Raises ServerError."""
    url = server()
    user, _, host = urllib.parse.urlsplit(url).netloc.rpartition("@")
    if user:  # http.client takes it for a part of the host, and says so in its errors
        raise ServerError(f"WANDB_BASE_URL holds a name or password for {host}; leave it out, the key says who asks "
                          "(WANDB_API_KEY)")  # fmt: skip
    key = _key(url)
    if key is None:
        raise ServerError(f"there is no key for {url}: set WANDB_API_KEY, or run `wandb login`")
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ServerError(f"WANDB_BASE_URL = {url} is no http(s) address")
    request = urllib.request.Request(  # noqa: S310  the scheme is checked
        f"{url}/graphql",
        json.dumps({"operationName": operation, "query": query, "variables": variables}).encode(),
        {
            "Content-Type": "application/json",
            "Authorization": f"Basic {base64.b64encode(f'api:{key}'.encode()).decode()}",
        },
    )
    try:
        with urllib.request.build_opener(_Straight).open(request, timeout=seconds) as answer:
            said = json.load(answer)
        errors = said.get("errors") or []
        if errors:
            raise ServerError(f"{url} refuses: {reason(errors[0].get('message', 'no more is known'))}")
        return dict(said["data"])
    except urllib.error.HTTPError as error:
        error.close()
        refused = "; is the key right? (WANDB_API_KEY, or `wandb login`)" if error.code in (401, 403) else ""
        raise ServerError(f"{url} answers with status {error.code}{refused}") from None
    except (OSError, http.client.HTTPException) as error:
        raise ServerError(f"{url} does not answer ({reason(getattr(error, 'reason', error))})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ServerError(f"{url} does not answer as a W&B server does") from None


def understood(read: Callable[[], T], whom: str = "") -> T:
    """What is read of an answer. Raises ServerError where it is none."""
    try:
        return read()
    except (TypeError, KeyError, ValueError, AttributeError):
        raise ServerError(f"{server()} does not answer {whom}as a W&B server does") from None


class _Straight(urllib.request.HTTPRedirectHandler):
    """No redirect is followed: urllib would take the key to whatever host it names."""

    def redirect_request(self, *_: Any) -> None:
        return None


def server() -> str:
    """Its address."""
    quiet()
    return str(wandb.setup().settings.base_url)


def app_address() -> str:
    """Where its pages are."""
    return str(wandb.setup().settings.app_url).rstrip("/")


def own_entity() -> str | None:
    """That of runs which name none, where WANDB_ENTITY or W&B's settings say so; else it is that of the key."""
    quiet()
    return wandb.setup().settings.entity or None


def reason(error: object) -> str:
    """The first line of an error, without the key, should it be there."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    key = os.environ.get("WANDB_API_KEY")
    return text.replace(key, "***") if key else text


def wandb_mode(mode: str) -> str:
    """`auto` becomes online where a key is at hand, else offline; the others are taken as they are."""
    if mode != "auto":
        return mode
    return "online" if _key(os.environ.get("WANDB_BASE_URL", "")) else "offline"


def _key(url: str) -> str | None:
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return None
    of_wandb = [host for host in hosts if "wandb" in host or host.endswith("forge.coreweave.com")]
    host = next((host for host in hosts if url and host in url), of_wandb[0] if of_wandb else None)
    return hosts[host][2] if host else None


def quiet() -> None:
    """Before anything is asked of W&B's client: once it is there it takes no more notice of these, and says so."""
    os.environ.setdefault("WANDB_SILENT", "true")
    # Telemetry of W&B's client: towards a server that accepts and never answers it held a process for 22 s at its end.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
