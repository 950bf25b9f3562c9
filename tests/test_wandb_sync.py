"""A run that was tracked offline and killed is uploaded whole by `wandb sync`."""

import gzip
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from running.tracking import Tracking, open_wandb
from running.wandb_logger import _teardown

BUCKET = {"id": "bucket", "name": "run", "displayName": "run", "config": "{}"}
PROJECT = {"id": "project", "name": "p", "entity": {"id": "entity", "name": "e"}}


class FakeWandb(BaseHTTPRequestHandler):
    """Answers what `wandb sync` asks, and keeps the history that it sends, as W&B's server does."""

    rows: list[dict[str, Any]]

    def log_message(self, *arguments: Any) -> None:
        """Says nothing."""

    def answer(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def read(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def do_GET(self) -> None:
        self.answer({})

    def do_PUT(self) -> None:
        self.read()
        self.answer({})

    def do_POST(self) -> None:
        body = self.read()
        if self.path.endswith("file_stream"):
            part = (json.loads(body).get("files") or {}).get("wandb-history.jsonl")
            if part:
                del self.rows[part["offset"] :]
                self.rows += [json.loads(line) for line in part["content"]]
            self.answer({"limits": {}})
        elif self.path == "/graphql":
            request = json.loads(body)
            self.answer({"data": self.data(request["query"], request.get("variables") or {})})
        else:
            self.answer({})

    def data(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "RunResumeStatus" in query:
            tail = json.dumps([json.dumps(row) for row in self.rows[-1:]])
            known = {"historyLineCount": len(self.rows), "historyTail": tail, "eventsTail": "[]"}
            counts = {"eventsLineCount": 0, "logLineCount": 0, "summaryMetrics": "{}"}
            bucket = BUCKET | known | counts | {"wandbConfig": '{"t": 1}', "tags": []}
            return {"model": PROJECT | {"bucket": bucket if self.rows else None}}
        if "UpsertBucket" in query:
            return {"upsertBucket": {"bucket": BUCKET | {"project": PROJECT}, "inserted": True}}
        if "CreateRunFiles" in query:
            url = f"http://127.0.0.1:{self.server.server_port}/upload"
            files = [{"name": name, "uploadUrl": url} for name in variables["files"]]
            return {"createRunFiles": {"runID": "bucket", "uploadHeaders": [], "files": files}}
        if "ServerFeatures" in query:
            return {"serverInfo": {"features": []}}
        if "viewer" in query:
            return {"viewer": {"id": "v", "entity": "e", "username": "e", "flags": "{}"}}
        return {}


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    handler = type("Handler", (FakeWandb,), {"rows": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.slow
def test_all_attempts_are_uploaded_as_one_run(
    server: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of them was killed while W&B wrote a record."""
    for name in ("WANDB_MODE", "WANDB_RUN_ID", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for values in ((0, 1, 2, 3), (4, 5, 6)):
        (logger,) = open_wandb(Tracking(mode="offline"), tmp_path, "test", seed=0, config={})
        for value in values:
            logger.log_metrics({"value": value}, step=value)
        logger.flush()
        file = Path(logger.experiment.settings.sync_file)
        if not values[0]:
            content = file.read_bytes()  # without what ends a run
        _teardown()
        if not values[0]:
            file.write_bytes(content[:-3])
    attempts = [str(path) for path in sorted(tmp_path.glob("wandb/offline-run-*"))]
    url = f"http://127.0.0.1:{server.server_port}"
    environment = os.environ | {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0123456789" * 4}
    command = ["wandb", "sync", *attempts]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=120)
    rows = server.RequestHandlerClass.rows
    assert [row["value"] for row in rows] == [0, 1, 2, 4, 5, 6]
    assert [row["_step"] for row in rows] == list(range(6))
