"""A stand-in for the Hugging Face Hub on 127.0.0.1, with its repositories in memory.

It speaks as much of the HTTP API as huggingface_hub uses to download and upload a folder.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

_REPO = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+)(/(?P<action>\w+)(/(?P<revision>[^/]+))?)?.*")
_FILE = re.compile(r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


class FakeHub(ThreadingHTTPServer):
    """A server of repositories.

    Attributes:
      files: {ORG/NAME: {file name: bytes}}.
      private: names of repositories that need the token "secret".
      fetched: names of the files that were downloaded.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.fetched: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, name: str) -> str:
        content = repr(sorted(self.files[name].items())).encode()
        return hashlib.sha1(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if file := _FILE.fullmatch(path):
            if self._may(file["name"], file["revision"]):
                self._send_file(file["name"], file["file"])
        elif repo := _REPO.fullmatch(path):
            if self._may(repo["name"], repo["revision"]):
                siblings = [{"rfilename": name} for name in self.server.files[repo["name"]]]
                commit = self.server.commit(repo["name"])
                if repo["action"] == "tree":
                    files = self.server.files[repo["name"]].items()
                    self._send(200, [_entry(name, content) for name, content in files])
                else:
                    self._send(200, {"id": repo["name"], "sha": commit, "siblings": siblings})
        else:
            self._send(404, {"error": path})

    do_HEAD = do_GET

    def do_POST(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/repos/create":
            asked = json.loads(body)
            if self.headers.get("Authorization") != "Bearer secret":
                self._send(401, {"error": "Invalid username or password."})
                return
            name = f"{asked['organization']}/{asked['name']}"
            self.server.files.setdefault(name, {})
            if asked.get("private") or asked.get("visibility") == "private":
                self.server.private.add(name)
            self._send(200, {"url": f"{self.server.address}/{name}"})
            return
        if path == "/api/validate-yaml":  # of a model card
            self._send(200, {"errors": [], "warnings": []})
            return
        repo = _REPO.fullmatch(path)
        if repo is None:
            self._send(404, {"error": path})
            return
        if not self._may(repo["name"], repo["revision"]):
            return
        if repo["action"] == "preupload":
            files = [
                file | {"uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._send(200, {"files": files})
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files[repo["name"]][line["value"]["path"]] = content
            commit = self.server.commit(repo["name"])
            page = f"{self.server.address}/{repo['name']}/commit/{commit}"
            self._send(200, {"commitUrl": page, "commitOid": commit, "success": True})

    def _may(self, name: str, revision: str | None) -> bool:
        """Whether the caller may see the repository; answers as the Hub does where not."""
        is_known = name in self.server.files
        is_open = name not in self.server.private
        if not is_known or not (is_open or self.headers.get("Authorization") == "Bearer secret"):
            self._send(401 if not is_open else 404, {}, {"X-Error-Code": "RepoNotFound"})
            return False
        if revision not in (None, "main", self.server.commit(name)):
            self._send(404, {}, {"X-Error-Code": "RevisionNotFound"})
            return False
        return True

    def _send_file(self, name: str, file: str) -> None:
        content = self.server.files[name].get(file)
        if content is None:
            self._send(404, {}, {"X-Error-Code": "EntryNotFound"})
            return
        if self.command == "GET":
            self.server.fetched.append(file)
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        headers = {"ETag": etag, "X-Repo-Commit": self.server.commit(name)}
        self._send(200, content, headers)

    def _send(self, code: int, content, headers=()) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _entry(name: str, content: bytes) -> dict:
    """A file in the listing of a repository."""
    oid = hashlib.sha1(content).hexdigest()
    return {"type": "file", "path": name, "size": len(content), "oid": oid}


@contextmanager
def standing_in():
    """Yields a running FakeHub."""
    server = FakeHub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
