"""What a W&B server keeps of artifacts: versions, their files and aliases, and which run made or used them."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from typing import Any


@dataclass
class StoredVersion:
    """files: of its manifest, by name, with digest, size and, for what is only referred to, ref.

    by: the run that made it. used_by: those that took it as an input. content: what was uploaded.
    """

    id: str
    collection: str
    kind: str
    digest: str
    number: int
    metadata: dict
    by: str
    client_id: str
    state: str = "PENDING"
    aliases: list[str] = field(default_factory=list)
    used_by: list[str] = field(default_factory=list)
    files: dict[str, dict] = field(default_factory=dict)
    content: dict[str, bytes] = field(default_factory=dict)


class ArtifactStore:
    """Answers to the operations of the real client that concern artifacts; a mixin of WandbServer."""

    entity: str
    environment: dict[str, str]

    def __init__(self) -> None:
        self.versions: dict[str, StoredVersion] = {}
        self._storing = threading.RLock()

    def version(self, name: str) -> StoredVersion:
        """The one version under COLLECTION:ALIAS. Raises ValueError where there is none."""
        collection, _, alias = name.partition(":")
        (found,) = (v for v in self.versions.values() if v.collection == collection and alias in v.aliases)
        return found

    def put(self, path: str, body: bytes) -> None:
        """A file, or the manifest, of a version: /storage/ID/NAME."""
        _, _, identity, name = path.split("/", 3)
        version = self.versions[identity]
        if name == "manifest":
            version.files = json.loads(body)["contents"]
        else:
            version.content[name] = body

    def _url(self, version: str, name: str) -> str:
        return f"{self.environment['WANDB_BASE_URL']}/storage/{version}/{name}"

    def ArtifactType(self, variables: dict) -> dict:
        collection = variables["name"].partition(":")[0]
        kinds = [{"artifactType": {"name": v.kind}} for v in self.versions.values() if v.collection == collection]
        return {"data": {"project": {"artifact": kinds[0] if kinds else None}}}

    def CreateArtifact(self, variables: dict) -> dict:
        wanted = variables["input"]
        with self._storing:
            collection, digest = wanted["artifactCollectionName"], wanted["digest"]
            line = [v for v in self.versions.values() if v.collection == collection]
            version = next((v for v in line if v.digest == digest and v.state == "COMMITTED"), None)
            if version is None:
                version = StoredVersion(
                    f"QXJ0{len(self.versions)}", collection, wanted["artifactTypeName"], digest, len(line),
                    json.loads(wanted.get("metadata") or "{}"), wanted["runName"], wanted["clientID"],
                )  # fmt: skip
                self.versions[version.id] = version
            version.client_id = wanted["clientID"]
            for alias in [*(a["alias"] for a in wanted.get("aliases") or []), "latest"]:
                for other in line:
                    other.aliases = [a for a in other.aliases if a != alias]
                version.aliases = [*(a for a in version.aliases if a != alias), alias]
            latest = {"id": line[-1].id} if line else None
            made = {"id": version.id, "state": version.state, "artifactSequence": {"latestArtifact": latest}}
            return {"data": {"createArtifact": {"artifact": made}}}

    def CreateArtifactManifest(self, variables: dict) -> dict:
        identity = variables["artifactID"]
        file = {"id": f"F{identity}", "uploadUrl": self._url(identity, "manifest"), "uploadHeaders": []}
        return {"data": {"createArtifactManifest": {"artifactManifest": {"id": f"M{identity}", "file": file}}}}

    def UpdateArtifactManifest(self, variables: dict) -> dict:
        identity = variables["artifactManifestID"][1:]
        file = {"id": f"F{identity}", "uploadUrl": self._url(identity, "manifest"), "uploadHeaders": []}
        return {"data": {"updateArtifactManifest": {"artifactManifest": {"id": f"M{identity}", "file": file}}}}

    def CreateArtifactFiles(self, variables: dict) -> dict:
        nodes = [
            {"node": {"storagePath": f"{file['artifactID']}/{file['name']}", "uploadHeaders": [],
                      "uploadUrl": self._url(file["artifactID"], file["name"]), "uploadMultipartUrls": None,
                      "artifact": {"id": file["artifactID"]}}}
            for file in variables["input"]["artifactFiles"]
        ]  # fmt: skip
        return {"data": {"createArtifactFiles": {"files": {"edges": nodes}}}}

    def CommitArtifact(self, variables: dict) -> dict:
        version = self.versions[variables["artifactID"]]
        version.state = "COMMITTED"
        return {"data": {"commitArtifact": {"artifact": {"id": version.id, "digest": version.digest}}}}

    def UseArtifact(self, variables: dict) -> dict:
        wanted = variables["input"]
        version = self.versions[wanted["artifactID"]]
        version.used_by = list(dict.fromkeys([*version.used_by, wanted["runName"]]))
        return {"data": {"useArtifact": {"artifact": {"id": version.id}}}}

    def ClientIDMapping(self, variables: dict) -> dict:
        found = next((v.id for v in self.versions.values() if v.client_id == variables["clientID"]), None)
        return {"data": {"clientIDMapping": {"serverID": found} if found else None}}

    def ArtifactByID(self, variables: dict) -> dict:
        version = self.versions[variables["id"]]
        project: dict[str, Any] = {"__typename": "Project", "id": "UHJq", "internalId": "UHJq", "name": "tests",
                                   "entity": {"name": self.entity}}  # fmt: skip
        sequence = {"__typename": "ArtifactSequence", "name": version.collection, "project": project}
        return {"data": {"artifact": {
            "__typename": "Artifact", "id": version.id, "artifactSequence": sequence, "versionIndex": version.number,
            "artifactType": {"name": version.kind}, "description": None, "metadata": json.dumps(version.metadata),
            "ttlDurationSeconds": -2, "ttlIsInherited": True, "tags": [], "historyStep": None, "state": version.state,
            "size": sum(int(file.get("size", 0)) for file in version.files.values()), "digest": version.digest,
            "commitHash": None, "fileCount": len(version.files), "createdAt": "2026-01-01T00:00:00", "updatedAt": None,
            "aliases": [{"__typename": "ArtifactAlias", "id": "QWxp", "alias": alias, "artifactCollection": sequence}
                        for alias in version.aliases],
        }}}  # fmt: skip
