"""A small mirror of the Hub on loopback: what its client asks for when it downloads a model or a data set's file."""

import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef" * 2 + "01234567"
PATHS = r"(?P<kind>datasets/)?(?P<name>[\w.-]+/[\w.-]+)"


@contextlib.contextmanager
def mirror(root: Path):
    """Serve the folders root/OWNER/NAME (models; one with a file `gated` needs a licence) and root/datasets/OWNER/NAME.

    Yields (the address for HF_ENDPOINT, a list to which the path of each downloaded file, OWNER/NAME/FILE, is added).
    """
    downloaded = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            self.answer()

        do_HEAD = do_GET

        def answer(self):
            path = self.path.partition("?")[0]
            info = re.fullmatch(rf"/api/(models/)?{PATHS}(/revision/main|/tree/{COMMIT})", path)
            file = re.fullmatch(rf"/{PATHS}/resolve/(main|{COMMIT})/(?P<file>.+)", path)
            found = info or file
            folder = root / (found["kind"] or "") / found["name"] if found else root
            if info and (folder / "gated").exists():
                return self.send(403, b"{}", {"X-Error-Code": "GatedRepo"})
            if info and folder.is_dir():
                body = listing(folder) if "/tree/" in path else {"id": found["name"], "sha": COMMIT, "siblings": []}
                return self.send(200, json.dumps(body).encode())
            if file and (folder / file["file"]).is_file():
                if self.command == "GET":
                    downloaded.append(f"{found['name']}/{file['file']}")
                return self.send(200, (folder / file["file"]).read_bytes())
            self.send(404, b"{}", {"X-Error-Code": "EntryNotFound" if folder.is_dir() else "RepoNotFound"})

        def send(self, status, body, headers=None):
            self.send_response(status)
            etag = hashlib.sha256(body).hexdigest()
            own = {"Content-Length": str(len(body)), "ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
            for name, value in (own | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", downloaded
    finally:
        server.shutdown()
        server.server_close()


def listing(folder: Path) -> list:
    """The files of a repository as the Hub lists them."""
    return [
        {
            "type": "file",
            "path": str(path.relative_to(folder)),
            "size": path.stat().st_size,
            "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
