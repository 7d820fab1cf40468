"""A server of W&B as far as its client needs one to begin a run, and to log to it; it may vanish at any moment."""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer:
    """Answers at a free port of this machine until it vanishes.

    Args:
        silently: Whether it takes connections once it has vanished, and never answers; else it refuses them.
    """

    def __init__(self, *, silently: bool) -> None:
        self.begun: list[str] = []  #: Ids of the runs that were begun.
        self.gone = threading.Event()  #: Set once it was sent the first figures of a run, with which it vanishes.
        self._silently = silently
        self._open: set[socket.socket] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Ends the server, whatever it does."""
        self._server.shutdown()
        self._server.server_close()
        for connection in self._open:
            connection.close()

    def _vanish(self) -> None:
        self.gone.set()
        if not self._silently:
            self._server.socket.close()
            for connection in self._open:
                connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, path: str, sent: dict[str, Any]) -> dict[str, Any]:
        if path.endswith("/file_stream"):
            self._vanish()
            return {}
        query, given = sent.get("query", ""), sent.get("variables") or {}
        if "upsertBucket" in query:
            self.begun.append(given["name"])
            project = {"id": "p", "name": given["project"], "entity": {"id": "e", "name": "someone"}}
            bucket = {"id": "b", "name": given["name"], "project": project, "historyLineCount": 0}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/{name}"} for name in given["files"]]
            return {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}
        account = {"id": "a", "entity": "someone", "username": "someone", "flags": "{}", "teams": {"edges": []}}
        return {"data": {"viewer": account}}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                outer._open.add(self.connection)

            def do_POST(self) -> None:
                sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                answer = {} if outer.gone.is_set() else outer._answer(self.path, sent)
                if outer.gone.is_set():
                    threading.Event().wait()
                content = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_PUT(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *words: object) -> None:
                """Says nothing."""

        return Handler
