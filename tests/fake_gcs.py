"""A stand-in for Google Cloud Storage on 127.0.0.1, with its objects in memory.

It speaks as much of the JSON API as gcsfs, google-cloud-storage, tensorstore and array_record's
reader use here; `environment` points all of them at it.
"""

import base64
import hashlib
import json
import os
import re
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

from etils.epath import gpath

_OBJECT = re.compile(r"(?:/download)?/storage/v1/b/(?P<bucket>[^/]+)/o/(?P<name>[^/]+)")
_OBJECTS = re.compile(r"/storage/v1/b/(?P<bucket>[^/]+)/o/?")
_BUCKET = re.compile(r"/storage/v1/b/(?P<bucket>[^/]+)/?")
_REWRITE = re.compile(
    r"/storage/v1/b/(?P<source>[^/]+)/o/(?P<name>[^/]+)"
    r"/rewriteTo/b/(?P<bucket>[^/]+)/o/(?P<target>[^/]+)"
)
_MOVE = re.compile(r"/storage/v1/b/(?P<bucket>[^/]+)/o/(?P<name>[^/]+)/moveTo/o/(?P<target>[^/]+)")
_UPLOAD = re.compile(r"/upload/storage/v1/b/(?P<bucket>[^/]+)/o")
_TIME = "2026-01-01T00:00:00.000Z"


class FakeGcs(ThreadingHTTPServer):
    """A server of buckets.

    Attributes:
      buckets: {bucket: {name: (bytes, generation)}}.
      forbidden: buckets that can be read but not written.
      broken: BUCKET/NAME of objects that are listed but cannot be read.
      written: BUCKET/NAME of the objects, in the order of writing.

    `put`, `delete` and `copy` change objects behind the clients' backs.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, *buckets: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.buckets = {name: {} for name in buckets}
        self.forbidden: set[str] = set()
        self.broken: set[str] = set()
        self.written: list[str] = []
        self.lock = threading.Lock()
        self._generation = 1_000_000

    def handle_error(self, request, client_address):
        # gcsfs asks for an object and a folder of one name at once, and hangs up on the slower.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def environment(self) -> dict[str, str]:
        """Variables that send every reader here; none looks for credentials elsewhere."""
        host = f"127.0.0.1:{self.server_port}"
        return {
            "STORAGE_EMULATOR_HOST": f"http://{host}",  # gcsfs, google-cloud-storage
            "TENSORSTORE_GCS_HTTP_URL": f"http://{host}",
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": f"http://{host}",  # array_record
            "GCE_METADATA_ROOT": host,  # tensorstore: not on Google's machines
            "GCE_METADATA_HOST": host,
            "NO_GCE_CHECK": "true",
            # It asks what kind of bucket this is by gRPC, which is not spoken here.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "EPATH_USE_TF": "false",  # TensorFlow's reader knows Google's own address alone
        }

    def put(self, bucket: str, name: str, data: bytes) -> dict:
        self._generation += 1
        self.buckets[bucket][name] = (bytes(data), self._generation)
        self.written.append(f"{bucket}/{name}")
        return self.resource(bucket, name)

    def delete(self, bucket: str, name: str) -> None:
        with self.lock:
            del self.buckets[bucket][name]

    def copy(self, bucket: str, prefix: str, to: str) -> None:
        """Copies all objects under one prefix to another."""
        with self.lock:
            for name, (data, _) in list(self.buckets[bucket].items()):
                if name.startswith(prefix):
                    self.put(bucket, to + name.removeprefix(prefix), data)

    def names(self, bucket: str) -> list[str]:
        with self.lock:
            return sorted(self.buckets[bucket])

    def resource(self, bucket: str, name: str) -> dict:
        data, generation = self.buckets[bucket][name]
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{generation}",
            "name": name,
            "bucket": bucket,
            "size": str(len(data)),
            "generation": str(generation),
            "metageneration": "1",
            "contentType": "application/octet-stream",
            "storageClass": "STANDARD",
            "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
            "timeCreated": _TIME,
            "updated": _TIME,
        }


@contextmanager
def standing_in(*buckets: str):
    """Serves these buckets to this process and to the processes that it starts."""
    before = dict(os.environ)
    server = FakeGcs(*buckets)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    os.environ.update(server.environment)
    gpath._is_tf_installed.cache_clear()  # it has asked for EPATH_USE_TF once
    try:
        yield server
    finally:
        os.environ.clear()
        os.environ.update(before)
        gpath._is_tf_installed.cache_clear()
        server.shutdown()
        server.server_close()
        thread.join()


class _Failure(Exception):
    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms between its head and its body

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer(self._get)

    def do_POST(self):
        self._answer(self._post)

    do_PUT = do_POST

    def do_DELETE(self):
        self._answer(self._delete)

    def _answer(self, method) -> None:
        self._body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        try:
            with self.server.lock:
                status, headers, data = method(parts.path, query)
        except _Failure as failure:
            error = {"code": failure.status, "message": str(failure), "errors": []}
            status, headers, data = failure.status, {}, json.dumps({"error": error}).encode()
        self.send_response(status)
        if data and "Content-Type" not in headers:
            headers["Content-Type"] = "application/json; charset=UTF-8"
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _get(self, path: str, query: dict):
        if match := _OBJECT.fullmatch(path):
            return self._get_object(self._bucket(match), unquote(match["name"]), query)
        if match := _OBJECTS.fullmatch(path):
            return 200, {}, json.dumps(self._list(self._bucket(match), query)).encode()
        if match := _BUCKET.fullmatch(path):
            self._bucket(match)
            # As for an account that may use objects only; gcsfs then lists the bucket.
            raise _Failure(403, "the caller does not have storage.buckets.get access")
        raise _Failure(404, f"no such address: {path}")

    def _post(self, path: str, query: dict):
        if match := _REWRITE.fullmatch(path):
            return self._rewrite(match)
        if match := _MOVE.fullmatch(path):
            bucket, name = self._writable(match), unquote(match["name"])
            moved = self.server.buckets[bucket].pop(name, None)
            if moved is None:
                raise _Failure(404, f"No such object: {bucket}/{name}")
            return self._store(bucket, unquote(match["target"]), moved[0], {})
        match = _UPLOAD.fullmatch(path)
        if not match:
            raise _Failure(404, f"no such address: {path}")
        bucket = self._writable(match)
        # The clients upload in one piece: what tests write is small.
        if "upload_id" in query:
            return self._store(bucket, query["upload_id"], self._body, query)
        if query["uploadType"] == "media":
            return self._store(bucket, query["name"], self._body, query)
        name = query.get("name") or json.loads(self._body)["name"]
        where = f"http://{self.headers['Host']}{path}?uploadType=resumable"
        return 200, {"Location": f"{where}&{urlencode({'upload_id': name})}"}, b""

    def _delete(self, path: str, query: dict):
        match = _OBJECT.fullmatch(path)
        if not match:
            raise _Failure(404, f"no such address: {path}")
        bucket, name = self._writable(match), unquote(match["name"])
        self._check_generation(bucket, name, query)
        if name not in self.server.buckets[bucket]:
            raise _Failure(404, f"No such object: {bucket}/{name}")
        del self.server.buckets[bucket][name]
        return 204, {}, b""

    def _bucket(self, match) -> str:
        bucket = unquote(match["bucket"])
        if bucket not in self.server.buckets:
            raise _Failure(404, "The specified bucket does not exist.")
        return bucket

    def _writable(self, match) -> str:
        bucket = self._bucket(match)
        if bucket in self.server.forbidden:
            raise _Failure(403, "the caller does not have storage.objects.create access")
        return bucket

    def _get_object(self, bucket: str, name: str, query: dict):
        objects = self.server.buckets[bucket]
        if name not in objects:
            raise _Failure(404, f"No such object: {bucket}/{name}")
        self._check_generation(bucket, name, query)
        data, generation = objects[name]
        if query.get("alt") != "media":
            return 200, {}, json.dumps(self.server.resource(bucket, name)).encode()
        if f"{bucket}/{name}" in self.server.broken:
            raise _Failure(403, "the caller does not have storage.objects.get access")
        headers = {"Content-Type": "application/octet-stream", "x-goog-generation": generation}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return 200, headers, data
        if wanted[1]:
            first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
        else:
            first, last = max(0, len(data) - int(wanted[2])), len(data) - 1
        last = min(last, len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return 206, headers, data[first : last + 1]

    def _list(self, bucket: str, query: dict) -> dict:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        found, prefixes = set(), set()
        for name in self.server.buckets[bucket]:
            rest = name.removeprefix(prefix)
            if not name.startswith(prefix):
                continue
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                found.add(name)
        entries = sorted(found | prefixes)
        start = int(query.get("pageToken", 0))
        end = start + int(query.get("maxResults", 1000))
        page = entries[start:end]
        listed = {
            "kind": "storage#objects",
            "items": [self.server.resource(bucket, name) for name in page if name in found],
            "prefixes": [name for name in page if name in prefixes],
        }
        if end < len(entries):
            listed["nextPageToken"] = str(end)
        return listed

    def _check_generation(self, bucket: str, name: str, query: dict) -> None:
        _, generation = self.server.buckets[bucket].get(name, (b"", 0))
        if "generation" in query and query["generation"] != str(generation):
            raise _Failure(404, f"No such object: {bucket}/{name}#{query['generation']}")
        if query.get("ifGenerationMatch", str(generation)) != str(generation):
            raise _Failure(412, "At least one of the pre-conditions did not hold.")

    def _store(self, bucket: str, name: str, data: bytes, query: dict):
        self._check_generation(bucket, name, query)
        return 200, {}, json.dumps(self.server.put(bucket, name, data)).encode()

    def _rewrite(self, match):
        found = self.server.buckets.get(unquote(match["source"]), {}).get(unquote(match["name"]))
        if not found:
            raise _Failure(404, f"No such object: {match['source']}/{unquote(match['name'])}")
        put = self.server.put(self._writable(match), unquote(match["target"]), found[0])
        return 200, {}, json.dumps({"done": True, "resource": put}).encode()
