"""A W&B server that records what real clients send: enough GraphQL and file streams for runs, sync and views.

    with RecordingServer() as server:
        subprocess.run([...], env={**os.environ, **server.environment()})
    server.runs["id"].history

Standard library only, for tests only.
"""

import gzip
import json
import re
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "5e" * 20  # has the form of a key, but belongs to no account
WHEN = "2026-01-01T00:00:00"
EMPTY = {"edges": [], "pageInfo": {"endCursor": None, "hasNextPage": False}}


@dataclass
class Run:
    """The data received of one run."""

    name: str
    group: str = ""
    job_type: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    rows: dict[int, str] = field(default_factory=dict)  # by their place in the stream
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(self.rows[place]) for place in sorted(self.rows)]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect, as W&B's does at its end."""


class RecordingServer:
    """Listens on a free port of this machine. `refuse`: every key is refused."""

    def __init__(self, *, refuse: bool = False) -> None:
        self.refuse = refuse
        self.runs: dict[str, Run] = {}
        self.artifacts: dict[str, dict[str, Any]] = {}  # id -> what CreateArtifact was given
        self.used: list[tuple[str, str]] = []  # (run, artifact id)
        self.alerts: list[dict[str, Any]] = []
        self.views: list[dict[str, Any]] = []
        self.uploads: dict[str, bytes] = {}
        self.unknown: list[str] = []
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                """Print no access log."""

            def do_GET(self) -> None:
                self.answer({})

            def do_PUT(self) -> None:
                body = self.body()
                with server.lock:
                    server.uploads[self.path] = body
                self.answer({})

            def do_POST(self) -> None:
                body = self.body()
                if server.refuse:
                    self.answer({"errors": [{"message": "invalid api key"}]}, 401)
                elif self.path.startswith("/graphql"):
                    asked = json.loads(body)
                    with server.lock:
                        self.answer({"data": server.graphql(asked["query"], asked.get("variables") or {})})
                else:
                    with server.lock:
                        if self.path.endswith("/file_stream"):
                            server.stream(self.path.split("/")[-2], json.loads(body))
                    self.answer({"limits": {}})

            def body(self) -> bytes:
                if self.headers.get("transfer-encoding", "") == "chunked":
                    parts = []
                    while size := int(self.rfile.readline().strip() or b"0", 16):
                        parts.append(self.rfile.read(size))
                        self.rfile.readline()
                    self.rfile.readline()
                    body = b"".join(parts)
                else:
                    body = self.rfile.read(int(self.headers.get("content-length") or 0))
                return gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body

            def answer(self, found: Any, code: int = 200) -> None:
                body = json.dumps(found).encode()
                self.send_response(code)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.http = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)

    def __enter__(self) -> "RecordingServer":
        self.thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.http.shutdown()
        self.http.server_close()

    def environment(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}

    def everything(self) -> str:
        """Everything that was received, as text, to be searched for what it must not contain."""
        seen = [self.runs, self.artifacts, self.alerts, self.views]
        return repr(seen) + "".join(b.decode(errors="replace") for b in self.uploads.values())

    # Requests of clients

    def stream(self, run: str, sent: dict[str, Any]) -> None:
        for name, part in (sent.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                lines = part["content"]
                self.runs[run].rows |= {part["offset"] + i: line for i, line in enumerate(lines)}
            elif name == "wandb-summary.json":
                self.runs[run].summary = json.loads(part["content"][-1])

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        name = re.search(r"\b(?:query|mutation)\s+(\w+)", query)
        operation = name.group(1) if name else ""
        given = variables.get("input") or variables
        answer = getattr(self, f"on_{operation}", None)
        if answer is not None:
            return answer(given)
        if "__type" in query or "__schema" in query:
            return {"__type": None, "QueryType": {"fields": []}, "MutationType": {"fields": []},
                    "TypeInfo": None, "CreateArtifactInput": {"inputFields": []}}  # fmt: skip
        if "serverInfo" in query:
            return {"serverInfo": {"features": [], "cliVersionInfo": {"max_cli_version": "9.9.9"},
                                   "latestLocalVersionInfo": None}}  # fmt: skip
        self.unknown.append(f"{operation} {' '.join(query.split())[:300]}")
        print(f"recording server: unknown {self.unknown[-1]}", file=sys.stderr)
        return {}

    def on_Viewer(self, given: dict[str, Any]) -> dict[str, Any]:
        viewer = {"id": "VXNlcg==", "entity": "me", "username": "me", "flags": "{}", "email": "", "admin": False,
                  "name": "me", "teams": {"edges": [{"node": {"name": "me"}}]}, "apiKeys": EMPTY}  # fmt: skip
        return {"viewer": viewer}

    def on_GetDefaultEntity(self, given: dict[str, Any]) -> dict[str, Any]:
        return self.on_Viewer(given)

    def on_RunResumeStatus(self, given: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(given["name"])
        bucket = None
        if run is not None and run.rows:
            tail = [run.rows[max(run.rows)]]
            bucket = {
                "id": f"run:{run.name}", "name": run.name, "displayName": run.name,
                "summaryMetrics": json.dumps(run.summary), "logLineCount": 0, "historyLineCount": len(run.rows),
                "eventsLineCount": 0, "config": "{}",
                "historyTail": json.dumps(tail), "eventsTail": "[]", "tags": [], "wandbConfig": '{"t":1}',
            }  # fmt: skip
        return {"model": {"id": "m", "name": "p", "entity": {"id": "e", "name": "me"}, "bucket": bucket}}

    def on_UpsertBucket(self, given: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.setdefault(given["name"], Run(given["name"]))
        run.group, run.job_type = given.get("groupName") or run.group, given.get("jobType") or run.job_type
        if given.get("config"):
            run.config |= {k: v.get("value") for k, v in json.loads(given["config"]).items()}
        project = {"id": "UHJv", "name": given.get("project") or "p", "entity": {"name": "me"}}
        bucket = {"id": f"run:{run.name}", "name": run.name, "displayName": given.get("displayName") or run.name,
                  "description": None, "config": "{}", "sweepName": None, "project": project,
                  "historyLineCount": len(run.rows)}  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": not run.rows}}

    def on_CreateRunFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": n, "uploadUrl": f"{self.url}/run/{given['run']}/{n}"} for n in given["files"]]
        return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}

    def on_CreateArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        artifact_id = f"artifact:{given['clientID'][:16]}"
        self.artifacts[artifact_id] = given
        sequence = {"id": "seq", "latestArtifact": None}
        return {"createArtifact": {"artifact": {"id": artifact_id, "state": "PENDING", "artifactSequence": sequence}}}

    def on_CreateArtifactManifest(self, given: dict[str, Any]) -> dict[str, Any]:
        url = f"{self.url}/manifest/{given['artifactID']}"
        file = {"id": "f", "name": "wandb_manifest.json", "displayName": "", "uploadUrl": url, "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": "man", "file": file}}}

    def on_CreateArtifactFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        edges = [
            {"node": {"id": "f", "name": f["name"], "displayName": f["name"], "uploadHeaders": [],
                      "uploadUrl": f"{self.url}/artifact/{f['artifactID']}/{f['name']}", "uploadMultipartUrls": None,
                      "storagePath": "x", "artifact": {"id": f["artifactID"]}}}
            for f in given["artifactFiles"]
        ]  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def on_CommitArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"commitArtifact": {"artifact": {"id": given["artifactID"], "digest": "d"}}}

    def on_UseArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        self.used.append((given["runName"], given["artifactID"]))
        return {"useArtifact": {"artifact": {"id": given["artifactID"], "digest": "d", "description": None,
                                             "state": "COMMITTED", "createdAt": WHEN, "metadata": None}}}  # fmt: skip

    def on_ArtifactByID(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"artifact": self.describe(given["id"])}

    def on_ArtifactByName(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": self.find(given["name"])}}

    def on_ArtifactMembershipByName(self, given: dict[str, Any]) -> dict[str, Any]:
        artifact = self.find(given["name"])
        if artifact is None:
            return {"project": {"artifactCollectionMembership": None}}
        collection = artifact["artifactSequence"]
        membership = {"__typename": "ArtifactCollectionMembership", "id": "m", "versionIndex": 0, "createdAt": WHEN,
                      "aliases": [], "artifactCollection": collection, "artifact": artifact}  # fmt: skip
        return {"project": {"artifactCollectionMembership": membership}}

    def on_ArtifactType(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": self.find(given["name"])}}

    def find(self, name: str) -> dict[str, Any] | None:
        collection, _, alias = name.partition(":")
        for artifact_id, a in self.artifacts.items():
            aliases = {entry["alias"] for entry in a.get("aliases") or []}
            if a["artifactCollectionName"] == collection and alias in aliases:
                return self.describe(artifact_id)
        return None

    def describe(self, artifact_id: str) -> dict[str, Any]:
        a = self.artifacts[artifact_id]
        kind = {"__typename": "ArtifactType", "name": a["artifactTypeName"], "id": "t"}
        project = {"id": "UHJv", "internalId": "UHJvOjE=", "name": a["projectName"],
                   "entity": {"__typename": "Entity", "id": "e", "name": "me"}}  # fmt: skip
        collection = {"__typename": "ArtifactSequence", "id": "seq", "name": a["artifactCollectionName"],
                      "project": project, "type": kind, "description": None, "createdAt": WHEN, "updatedAt": None,
                      "tags": {"edges": []}}  # fmt: skip
        return {
            "__typename": "Artifact", "id": artifact_id, "clientId": a["clientID"],
            "name": f"{a['artifactCollectionName']}:v0", "artifactSequence": collection, "versionIndex": 0,
            "artifactType": kind, "description": None, "metadata": a.get("metadata") or "{}",
            "ttlDurationSeconds": -2, "ttlIsInherited": True, "tags": [], "aliases": [], "historyStep": None,
            "state": "COMMITTED", "size": 1, "digest": a.get("digest", "d"), "commitHash": "c", "fileCount": 1,
            "createdAt": WHEN, "updatedAt": None, "artifactMemberships": {"edges": []}, "currentManifest": None,
            "artifactCollections": {"edges": []},
        }  # fmt: skip

    def on_ProjectInternalId(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"id": "UHJv", "internalId": "UHJvOjE="}}

    def on_OrganizationCoreWeaveOrganizationID(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"entity": {"organization": None}}

    def on_NotifyScriptableRunAlert(self, given: dict[str, Any]) -> dict[str, Any]:
        self.alerts.append(given)
        return {"notifyScriptableRunAlert": {"success": True}}

    def on_GetProjects(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"models": EMPTY}

    def on_UpsertView2(self, given: dict[str, Any]) -> dict[str, Any]:
        self.views.append(given)
        return {"upsertView": {"view": {"id": "VmlldzoxMjM=", "name": given.get("name")}, "inserted": True}}
