"""A real web server on the loopback that misbehaves in every way that servers of training images do."""

from __future__ import annotations

import email.utils
import io
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from PIL import Image

LOGINS = ("Authorization", "Proxy-Authorization", "Cookie")


def picture(color: str = "red", kind: str = "PNG", size: tuple[int, int] = (48, 40)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, color).save(content, kind)
    return content.getvalue()


def bomb(width: int = 20_000, height: int = 20_000) -> bytes:
    """A PNG of a few hundred bytes whose header asks for 1.2 GB."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


class Handler(BaseHTTPRequestHandler):
    """Answers by path; the server's ``seen`` counts requests, ``at_once`` the most of them open together.

    ``logins`` are those that anybody sent.
    """

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        """Tests print nothing."""

    def do_GET(self) -> None:
        path = urlsplit(self.path).path  # a proxy is asked for whole addresses
        with self.server.lock:
            self.server.logins += [self.headers[name] for name in LOGINS if name in self.headers]
            self.server.seen[self.path] += 1
            self.server.open += 1
            self.server.at_once = max(self.server.at_once, self.server.open)
            times = self.server.seen[self.path]
        try:
            getattr(self, path.strip("/").split("/")[0].split(".")[0])(times)
        except OSError:
            pass  # the client had enough
        finally:
            with self.server.lock:
                self.server.open -= 1

    def reply(self, content: bytes, kind: str = "image/png", status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def good(self, times: int) -> None:
        self.reply(picture())

    def jpeg(self, times: int) -> None:
        self.reply(picture("blue", "JPEG"), "image/jpeg")

    def slow(self, times: int) -> None:
        time.sleep(0.1)
        self.reply(picture())

    def quoted(self, times: int) -> None:
        """Fine for the very characters that the link has, as signed links are."""
        if self.path == "/quoted/a%2Cb%20c.png?sign=%7E%2B":
            self.reply(picture())
        else:
            self.reply(b"", status=403)

    def lying(self, times: int) -> None:
        self.reply(picture("green", "PNG"), "text/html; charset=utf-8")

    def page(self, times: int) -> None:
        self.reply(b"\n<!DOCTYPE html><html><body>Image not found</body></html>", "image/jpeg")

    def text(self, times: int) -> None:
        self.reply(b"gone", "image/jpeg")

    def svg(self, times: int) -> None:
        self.reply(b'<svg xmlns="http://www.w3.org/2000/svg"/>', "image/svg+xml")

    def postscript(self, times: int) -> None:
        """A format that Pillow hands to another program."""
        self.reply(picture("red", "EPS"), "image/png")

    def pixel(self, times: int) -> None:
        self.reply(picture(size=(1, 1)))

    def bomb(self, times: int) -> None:
        self.reply(bomb())

    def large(self, times: int) -> None:
        """More pixels than the test allows, fewer than Pillow minds."""
        self.reply(picture(size=(1500, 1000)))

    def cut(self, times: int) -> None:
        """A JPEG that was never longer on the server."""
        self.reply(picture("blue", "JPEG", (400, 400))[:-600])

    def short(self, times: int) -> None:
        """Broken off before what was announced."""
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        self.wfile.write(picture())
        self.close_connection = True

    def short_once(self, times: int) -> None:
        self.short(times) if times == 1 else self.reply(picture())

    def reset(self, times: int) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RD)
        self.close_connection = True
        self.connection.close()

    def huge(self, times: int) -> None:
        """Says how much it is."""
        self.send_response(200)
        self.send_header("Content-Length", str(2**40))
        self.end_headers()
        self.wfile.write(picture())

    def endless(self, times: int) -> None:
        """Does not say how much it is, and does not stop."""
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(picture())
        while True:
            self.wfile.write(bytes(2**16))
            self.server.sent += 2**16

    def zipped(self, times: int) -> None:
        """A few bytes that unpack to far too much, though nothing packed was asked for."""
        content = zlib.compress(bytes(2**23))
        self.reply(content, Content_Encoding="deflate")

    def silent(self, times: int) -> None:
        self.server.stop.wait(30)

    def drip(self, times: int) -> None:
        """A byte now and then: never silent for long, never done."""
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        while not self.server.stop.wait(0.05):
            self.wfile.write(b"x")

    def drip_head(self, times: int) -> None:
        """The same before the answer has even begun."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while not self.server.stop.wait(0.05):
            self.wfile.write(b"x")

    def missing(self, times: int) -> None:
        self.reply(b"", status=404)

    def busy(self, times: int) -> None:
        """503 twice, then fine."""
        self.reply(b"", status=503) if times < 3 else self.reply(picture())

    def broken(self, times: int) -> None:
        self.reply(b"", status=500)

    def later(self, times: int) -> None:
        self.server.asked.append(time.monotonic())
        self.reply(b"", status=429, Retry_After="1") if times == 1 else self.reply(picture())

    def date(self, times: int) -> None:
        when = email.utils.formatdate(time.time() + 3600, usegmt=True)
        self.reply(b"", status=429, Retry_After=when)

    def moved(self, times: int) -> None:
        self.reply(b"", status=302, Location="/good.png")

    def to(self, times: int) -> None:
        """Moved to wherever the query says."""
        self.reply(b"", status=302, Location=unquote(urlsplit(self.path).query))

    def loop(self, times: int) -> None:
        self.reply(b"", status=302, Location="/loop.png")

    def to_file(self, times: int) -> None:
        self.reply(b"", status=302, Location="file:///etc/hostname")

    def garbage(self, times: int) -> None:
        self.wfile.write(b"this is not HTTP\r\n\r\n")
        self.close_connection = True


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, host: str, port: int) -> None:
        super().__init__((host, port), Handler)
        self.logins: list[str] = []
        self.seen: Counter[str] = Counter()
        self.lock, self.stop = threading.Lock(), threading.Event()
        self.open = self.at_once = self.sent = 0
        self.asked: list[float] = []

    def handle_error(self, *_: object) -> None:
        """A connection that was cut is what tests are about."""

    def url(self, path: str) -> str:
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}/{path}"


@contextmanager
def serve(host: str = "127.0.0.1", port: int = 0) -> Iterator[Server]:
    with Server(host, port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.stop.set()
            server.shutdown()
            thread.join()
