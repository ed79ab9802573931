"""A W&B server in memory, on the loopback, for the real wandb client: runs, alerts, artifacts, saved views.

It answers what wandb 0.31.0 and wandb-workspaces 0.4.13 were seen to ask, and keeps what they say in plain
attributes. A real server checks more than this one does: that a request is right for it is not shown here.

    with WandbStub() as server:
        ...  # processes with server.environment
        server.runs["id"].history
"""

from __future__ import annotations

import gzip
import json
import socket
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = "team"


@dataclass
class StoredRun:
    name: str
    project: str
    display_name: str = ""
    group: str | None = None
    job_type: str | None = None
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    lines: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Line number of the history to its row."""
    num_system_lines: int = 0
    exit_code: int | None = None
    is_complete: bool = False

    @property
    def history(self) -> list[dict[str, Any]]:
        return [self.lines[number] for number in sorted(self.lines)]


class WandbStub:
    """Serves until the `with` block ends. `fail` makes it answer every request with that status; `hang` lets
    requests wait until it is cleared."""

    def __init__(self, port: int = 0) -> None:
        self.runs: dict[str, StoredRun] = {}
        self.alerts: list[dict[str, Any]] = []
        self.artifacts: list[dict[str, Any]] = []
        self.views: list[dict[str, Any]] = []
        """What upsertView was given, in order."""
        self.saved: dict[str, dict[str, Any]] = {}
        """Views by id, as they are now."""
        self.files: dict[str, bytes] = {}
        self.operations: list[str] = []
        self.unknown: list[str] = []
        self.fail: int | None = None
        self.answering = threading.Event()
        self.answering.set()
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self._server.daemon_threads = True
        self._server.handle_error = lambda request, address: None  # clients leave without a word
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.environment = {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": "0" * 40,
            "WANDB_MODE": "online",
            "WANDB_ERROR_REPORTING": "false",
        }

    def __enter__(self) -> WandbStub:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.answering.set()
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        """Status and reply of a POST."""
        if self.fail:
            return self.fail, {"error": "injected"}
        with self._lock:
            if path == "/graphql":
                asked = json.loads(body)
                operation = asked["query"].split("(")[0].split("{")[0].split()[-1]
                self.operations.append(operation)
                answer = getattr(self, f"_{operation}", None)
                if answer is None:
                    self.unknown.append(operation)
                    return 200, {"data": None, "errors": [{"message": f"unknown: {operation}"}]}
                return 200, {"data": answer(asked.get("variables") or {})}
            if path.endswith("/file_stream"):
                self._stream(path.split("/")[-2], json.loads(body or b"{}"))
                return 200, {"limits": {}}
            return 404, {}

    # --- runs ---

    def _Viewer(self, asked: dict[str, Any]) -> Any:
        viewer = {"id": "u", "entity": ENTITY, "username": "tester", "email": "", "flags": "{}"}
        return {"viewer": {**viewer, "teams": {"edges": []}}}

    _GetDefaultEntity = _Viewer

    def _ServerFeaturesQuery(self, asked: dict[str, Any]) -> Any:
        return {"serverInfo": {"features": []}}

    def _OrganizationCoreWeaveOrganizationID(self, asked: dict[str, Any]) -> Any:
        return {"entity": {"organization": None}}

    def _RunResumeStatus(self, asked: dict[str, Any]) -> Any:
        run = self.runs.get(asked["name"])
        project = {"id": "p", "name": asked.get("project"), "entity": {"id": "e", "name": ENTITY}}
        return {"model": {**project, "bucket": None if run is None else self._bucket(run)}}

    def _UpsertBucket(self, asked: dict[str, Any]) -> Any:
        is_new = asked["name"] not in self.runs
        run = self.runs.setdefault(asked["name"], StoredRun(asked["name"], asked.get("project") or ""))
        run.display_name = asked.get("displayName") or run.display_name
        run.group = asked.get("groupName") or run.group
        run.job_type = asked.get("jobType") or run.job_type
        run.tags = asked.get("tags") or run.tags
        run.config.update(json.loads(asked.get("config") or "{}"))
        return {"upsertBucket": {"bucket": self._bucket(run), "inserted": is_new}}

    def _bucket(self, run: StoredRun) -> dict[str, Any]:
        newest = run.history[-1:]
        return {
            "id": f"run-{run.name}",
            "name": run.name,
            "displayName": run.display_name,
            "description": "",
            "sweepName": None,
            "config": json.dumps(run.config),
            "summaryMetrics": json.dumps(run.summary),
            "tags": run.tags,
            "notes": None,
            "logLineCount": 0,
            "historyLineCount": len(run.lines),
            "eventsLineCount": run.num_system_lines,
            "historyTail": json.dumps([json.dumps(row) for row in newest]),
            "eventsTail": "[]",
            "wandbConfig": json.dumps({"t": 1}),
            "project": {"id": "p", "name": run.project, "entity": {"id": "e", "name": ENTITY}},
        }

    def _stream(self, name: str, sent: dict[str, Any]) -> None:
        run = self.runs[name]
        for file, part in (sent.get("files") or {}).items():
            offset, lines = part.get("offset", 0), part.get("content", [])
            if file == "wandb-history.jsonl":
                run.lines.update({offset + at: json.loads(line) for at, line in enumerate(lines)})
            elif file == "wandb-summary.json":
                run.summary = json.loads(lines[-1])
            elif file == "wandb-events.jsonl":
                run.num_system_lines = max(run.num_system_lines, offset + len(lines))
        if sent.get("complete"):
            run.is_complete, run.exit_code = True, sent.get("exitcode")

    def _CreateRunFiles(self, asked: dict[str, Any]) -> Any:
        places = self._places(f"{asked['run']}/{name}" for name in asked["files"])
        files = [{"name": name, "uploadUrl": url} for name, url in zip(asked["files"], places, strict=True)]
        return {"createRunFiles": {"runID": asked["run"], "uploadHeaders": [], "files": files}}

    def _MarkRunFilesUploaded(self, asked: dict[str, Any]) -> Any:
        return {"markRunFilesUploaded": {"success": True}}

    def _NotifyScriptableRunAlert(self, asked: dict[str, Any]) -> Any:
        self.alerts.append(asked)
        return {"notifyScriptableRunAlert": {"success": True}}

    def _places(self, names: Iterable[str]) -> list[str]:
        return [f"{self.url}/storage/{name}" for name in names]

    # --- artifacts ---

    def _ArtifactType(self, asked: dict[str, Any]) -> Any:
        return {"project": {"artifact": None}}

    def _CreateArtifact(self, asked: dict[str, Any]) -> Any:
        given = asked["input"]
        name = (given.get("artifactCollectionNames") or [given.get("artifactCollectionName")])[0]
        number = len(self.artifacts)
        self.artifacts.append(
            {
                "id": f"A{number}",
                "type": given["artifactTypeName"],
                "name": name,
                "metadata": json.loads(given.get("metadata") or "{}"),
                "is_committed": False,
            }
        )
        artifact = {"id": f"A{number}", "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
        return {"createArtifact": {"artifact": artifact}}

    def _CreateArtifactManifest(self, asked: dict[str, Any]) -> Any:
        (url,) = self._places([f"{asked['artifactID']}/manifest.json"])
        file = {"id": "F", "name": asked["name"], "displayName": asked["name"]}
        file |= {"uploadUrl": url, "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": asked["artifactID"], "file": file}}}

    def _CreateArtifactFiles(self, asked: dict[str, Any]) -> Any:
        edges = []
        for spec in asked["input"]["artifactFiles"]:
            (url,) = self._places([f"{spec['artifactID']}/files/{spec['name']}"])
            node = {"storagePath": spec["name"], "uploadUrl": url, "uploadHeaders": []}
            edges.append({"node": {**node, "artifact": {"id": spec["artifactID"]}}})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _CommitArtifact(self, asked: dict[str, Any]) -> Any:
        artifact = self.artifacts[int(asked["artifactID"][1:])]
        artifact["is_committed"] = True
        manifest = json.loads(self.files[f"{artifact['id']}/manifest.json"])
        artifact["entries"] = manifest["contents"]
        return {"commitArtifact": {"artifact": {"id": artifact["id"], "digest": "d"}}}

    def _FetchArtifactDigestAlgorithm(self, asked: dict[str, Any]) -> Any:
        return {"project": {"artifactType": {"artifactCollection": None}}}

    # --- workspaces ---

    def _View(self, asked: dict[str, Any]) -> Any:
        found = [view for view in self.saved.values() if view["name"] == asked["viewName"]]
        nodes = [{"node": {key: view[key] for key in ("id", "displayName", "spec")}} for view in found]
        return {"project": {"allViews": {"edges": nodes}}}

    def _UpsertView2(self, asked: dict[str, Any]) -> Any:
        self.views.append(asked)
        number = asked.get("id") or f"V{len(self.saved)}"
        is_new = number not in self.saved
        self.saved[number] = {**asked, "id": number}
        return {"upsertView": {"view": {"id": number, "name": asked["name"]}, "inserted": is_new}}


def _handler(stub: WandbStub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            stub._connections.add(self.connection)

        def log_message(self, *words: object) -> None: ...

        def do_POST(self) -> None:
            body = self._body()
            stub.answering.wait()
            self._reply(*stub.answer(self.path, body))

        def do_PUT(self) -> None:
            body = self._body()
            stub.answering.wait()
            if not stub.fail:
                stub.files[self.path.removeprefix("/storage/")] = body
            self._reply(stub.fail or 200, {})

        def do_GET(self) -> None:
            self._reply(404, {})

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "") == "chunked":
                body = b""
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

        def _reply(self, status: int, value: Any) -> None:
            text = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    return Handler
