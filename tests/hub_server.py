"""A stand-in for the Hugging Face Hub on loopback: the calls by which huggingface_hub creates repositories and commits.

Endpoints as in huggingface_hub 2.4 (`hf_api.py`, `_commit_api.py`, `lfs.py`); large files go by the Git LFS batch
protocol, which the client uses where Xet is disabled. Metadata is checked by what the Hub documents of it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

# A part of https://huggingface.co/docs/hub/repositories-licenses.
LICENCES = {"apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "gemma", "llama3", "other", "unknown"}
PREFIX = {"models": "", "datasets": "datasets/"}


@dataclass
class Repository:
    """A repository: its files, those of them that are large, and each commit's name with the files that it changed."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)
    commits: list[tuple[str, list[str]]] = field(default_factory=lambda: [("0" * 40, [])])


@dataclass
class Fault:
    """What goes wrong with a request whose method and path hold `where`, `times` times from the first on.

    `how` is a status, "reset" (the connection is torn before anything is done), "lost" (after it is done), or "torn"
    (status 502 with a page that is no JSON).
    """

    where: str
    how: int | str
    times: int = 1


class HubServer:
    """Serves repositories of the account `owner`. `token` may write, `reader` may only read."""

    token, reader, owner = "hf_good0123456789good0123456789good", "hf_read0123456789read0123456789read", "me"

    def __init__(self, *faults: Fault) -> None:
        self.faults = list(faults)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.lock = threading.RLock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                """Say nothing."""

            def reply(self, status: int, body: Any, message: str | None = None) -> None:
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if isinstance(body, bytes) else "application/json")
                self.send_header("Content-Length", str(len(content)))
                if message:
                    self.send_header("X-Error-Message", message)
                self.end_headers()
                self.wfile.write(content)

            def reset(self) -> None:
                linger = struct.pack("ii", 1, 0)  # closing sends RST
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.close_connection = True
                self.connection.close()
                self.rfile = self.wfile = open("/dev/null", "r+b")  # noqa: SIM115 - nothing more can be said

            def do_any(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"] or 0))
                path = self.path.partition("?")[0]
                with server.lock:
                    server.requests.append(f"{self.command} {path}")
                    how = server.fault(f"{self.command} {path}")
                    if how == "reset":
                        return self.reset()
                    if how == "torn":
                        return self.reply(502, b"<html>Bad gateway</html>")
                    if isinstance(how, int):
                        return self.reply(how, {"error": "as the test wants it"})
                    status, answer = server.answer(
                        self.command, path, body, self.headers["Authorization"], f"http://{self.headers['Host']}"
                    )
                    if how == "lost":
                        return self.reset()
                    return self.reply(status, answer, answer.get("error") if isinstance(answer, dict) else None)

            do_GET = do_POST = do_PUT = do_HEAD = do_any

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> HubServer:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def fault(self, request: str) -> int | str | None:
        for fault in self.faults:
            if fault.where in request and fault.times > 0:
                fault.times -= 1
                return fault.how
        return None

    def answer(self, method: str, path: str, body: bytes, authorization: str | None, url: str) -> tuple[int, Any]:
        """Return a status and what the Hub says."""
        if path.startswith("/lfs/"):  # the address is signed, and the token does not go there
            return self.store(path.removeprefix("/lfs/"), body)
        if path == "/api/validate-yaml":
            errors = card_errors(**json.loads(body))
            return (400 if errors else 200), {"errors": [{"message": one} for one in errors], "warnings": []}
        token = (authorization or "").removeprefix("Bearer ")
        if token not in (self.token, self.reader):
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            return self.create(json.loads(body), token, url)
        match = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(preupload|commit|revision)/main)?", path)
        large = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path)
        kind = match[1] if match else "datasets" if large and large[1] else "models"
        name = match[2] if match else large[2] if large else ""
        repository = self.repositories.get(f"{kind}/{name}")
        if repository is None:
            return 404, {"error": "Repository not found"}
        if method == "GET":
            head = re.match(r"---\n(.*?)\n---\n", repository.files.get("README.md", b"").decode(), re.DOTALL)
            told = {"sha": repository.commits[-1][0], "private": repository.private}
            return 200, {"id": name, **told, "cardData": yaml.safe_load(head[1]) if head else None}
        if token == self.reader:
            return 403, {"error": "You do not have write access"}
        if large:
            return 200, self.batch(json.loads(body), url)
        assert match
        if match[3] == "preupload":
            return 200, {"files": [self.preupload(repository, one) for one in json.loads(body)["files"]]}
        return self.commit(repository, body, f"{url}/{PREFIX[kind]}{name}")

    def create(self, asked: dict[str, Any], token: str, url: str) -> tuple[int, Any]:
        kind = f"{asked['type']}s"
        name = f"{asked['organization']}/{asked['name']}"
        if token == self.reader or asked["organization"] != self.owner:
            return 403, {"error": f"You don't have the rights to create a {asked['type']} under this namespace"}
        answer = {"url": f"{url}/{PREFIX[kind]}{name}", "name": name}
        if f"{kind}/{name}" in self.repositories:
            return 409, {**answer, "error": "You already created this repo"}
        self.repositories[f"{kind}/{name}"] = Repository(asked.get("visibility") == "private")
        return 200, answer

    def preupload(self, repository: Repository, asked: dict[str, Any]) -> dict[str, Any]:
        path = asked["path"]
        mode = "lfs" if path.endswith((".safetensors", ".parquet")) or asked["size"] > 10_000_000 else "regular"
        there = repository.files.get(path)
        oid = None
        if there is not None:
            blob = hashlib.sha1(b"blob %d\0" % len(there) + there).hexdigest()
            oid = hashlib.sha256(there).hexdigest() if path in repository.lfs else blob
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def batch(self, asked: dict[str, Any], url: str) -> dict[str, Any]:
        objects = []
        for one in asked["objects"]:
            actions = {"upload": {"href": f"{url}/lfs/{one['oid']}"}, "verify": {"href": f"{url}/lfs/verify"}}
            objects.append(one if one["oid"] in self.objects else one | {"actions": actions})
        return {"transfer": "basic", "objects": objects}

    def store(self, name: str, body: bytes) -> tuple[int, Any]:
        if name == "verify":
            return (200 if json.loads(body)["oid"] in self.objects else 404), {}
        if hashlib.sha256(body).hexdigest() != name:
            return 400, {"error": "the content is not that of the address"}
        self.objects[name] = body
        return 200, {}

    def commit(self, repository: Repository, body: bytes, url: str) -> tuple[int, Any]:
        changed = []
        for line in filter(None, body.split(b"\n")):
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    return 400, {"error": "the large file was not uploaded"}
                repository.files[value["path"]] = self.objects[value["oid"]]
                repository.lfs.add(value["path"])
            else:
                assert entry["key"] == "header"
                continue
            changed.append(value["path"])
        oid = hashlib.sha1(f"{url}{len(repository.commits)}".encode()).hexdigest()
        repository.commits.append((oid, changed))
        return 200, {"success": True, "commitUrl": f"{url}/commit/{oid}", "commitOid": oid}


def card_errors(content: str, repoType: str) -> list[str]:
    """Return what is wrong with a card's metadata.

    Source: huggingface/hub-docs, modelcard.md and datasetcard.md; huggingface_hub, repocard_data.py.
    """
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    data = yaml.safe_load(match[1]) if match else None
    if not isinstance(data, dict):
        return ["there is no metadata"]
    errors = []
    if data.get("license") not in {None, *LICENCES}:
        errors.append(f"license: {data['license']!r} is none of the Hub's")
    texts = ["license", "pretty_name", "library_name", "pipeline_tag", "base_model", "base_model_relation"]
    errors += [f"{key}: must be a string" for key in texts if key in data and not isinstance(data[key], str)]
    lists = ["tags", "datasets", "size_categories", "task_categories", "configs", "model-index"]
    errors += [f"{key}: must be a list" for key in lists if key in data and not isinstance(data[key], list)]
    name = re.compile(r"[\w.-]+(/[\w.-]+)?")
    ids = [data.get("base_model"), *(data.get("datasets") or [])]
    errors += [f"{one!r} is no id on the Hub" for one in ids if one is not None and not name.fullmatch(str(one))]
    for index in data.get("model-index") or []:
        required = {"task": ("type",), "dataset": ("type", "name")}
        for result in index["results"]:
            errors += [f"{part}.{key} is required" for part, keys in required.items() for key in keys
                       if not isinstance(result[part].get(key), str)]  # fmt: skip
            errors += [
                "a metric needs type and value" for one in result["metrics"] if not {"type", "value"} <= set(one)
            ]
    if repoType == "dataset" and "model-index" in data:
        errors.append("model-index: not in a dataset")
    return errors
