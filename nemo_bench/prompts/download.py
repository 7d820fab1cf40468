"""Fetches training images from the links of published prompt lists.

Published lists name training images by links, of which many are dead by now, and servers answer in every way they can:
slowly, with pages in place of images, with far too much, or not at all. Whatever happens to a link is noted in a
manifest, so that what is missing is counted wherever a number depends on it.

A list may come from anyone, so a link gets nothing of the user's: no login of ``~/.netrc``, of the link itself or of a
cookie, and no way to addresses that only this machine reaches. Proxies of the environment (``HTTP_PROXY``,
``HTTPS_PROXY``, ``NO_PROXY``) are used.
"""

from __future__ import annotations

import asyncio
import email.utils
import hashlib
import io
import ipaddress
import json
import math
import os
import random
import socket
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote, urldefrag, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from PIL import Image, UnidentifiedImageError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from yarl import URL

from nemo_bench.errors import ConfigError
from nemo_bench.prompts import MANIFEST, read_links, read_manifest
from nemo_bench.prompts.lists import without_login
from nemo_bench.records.data import Record
from nemo_bench.records.io import write_text
from nemo_bench.records.pictures import to_rgb

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Formats that are taken, by what the bytes are."""
SMALLEST = 32
"""Least width and height in pixels; what is smaller stands in for an image."""
BUSY = frozenset({408, 425, 429})
"""Answers that, like all from 500 on, may be others in a while."""
MOVED = frozenset({301, 302, 303, 307, 308})
"""Answers that name another address."""
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_NAT64_LOCAL = ipaddress.ip_network("64:ff9b:1::/48")


@dataclass(frozen=True)
class Limits:
    """How much is asked of the network, and how much is taken from it.

    Attributes:
        parallel: Links fetched at a time.
        per_host: Links of one host fetched at a time.
        retries: Further tries of what may heal.
        backoff: Seconds before the second try, doubled before each further one; up to half as much again is added by
            chance.
        longest_wait: Most seconds that a server may ask to wait (``Retry-After``); above, the link is given up.
        connect: Seconds to connect.
        read: Seconds without a single byte.
        total: Seconds a try may take altogether.
        megabytes: Most bytes of an image, in units of 2^20.
        megapixels: Most pixels of an image, in millions.
        redirects: Redirections followed.
        private: Whether addresses may be asked that are not public, such as those of this machine and its network.
    """

    parallel: int = 16
    per_host: int = 4
    retries: int = 3
    backoff: float = 1.0
    longest_wait: float = 60.0
    connect: float = 10.0
    read: float = 20.0
    total: float = 90.0
    megabytes: float = 32.0
    megapixels: float = 64.0
    redirects: int = 5
    private: bool = False

    def __post_init__(self) -> None:
        for name in ("retries", "backoff", "longest_wait", "redirects"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: expected 0 or more")
        for name in ("parallel", "per_host", "connect", "read", "total", "megabytes", "megapixels"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)}: expected more than 0")


class _DeadLinkError(Exception):
    """Why a link gives no image, whether that may pass, and how long the server asks to wait."""

    def __init__(self, why: str, *, may_heal: bool = False, wait: float = 0.0) -> None:
        super().__init__(why)
        self.why, self.may_heal, self.wait = why, may_heal, wait


def fetch(
    lists: Sequence[Path | str], folder: Path | str, limits: Limits | None = None, *, progress: bool = True
) -> dict[str, Any]:
    """Fetches the images that prompt lists link to; a link that several prompts have is fetched once.

    What lies in the folder already, with the checksum it had, is kept. Links that were dead are tried again only where
    their failure may pass: a server that was busy or did not answer, a broken connection.

    Args:
        lists: Prompt files with a column ``url`` or ``urls``.
        folder: Where images and ``manifest.jsonl`` go (see :func:`nemo_bench.prompts.read_manifest`); may hold those of
            other lists.
        limits: Limits; None for the defaults.
        progress: Whether a bar is shown.

    Returns:
        ``links`` in the lists, ``fetched`` now, ``kept`` from before; ``dead``, the manifest's entries of dead links;
        ``prompts`` with a link, and ``prompts_without_reference``, those of them that have dead links only; ``same``,
        lists of links that gave the very same file, which may be a picture that stands in for a lost one; ``folder``.

    Raises:
        PromptError: A list can't be read or has no links.
        ConfigError: Two lists have the same file name, the folder is a file, or a proxy is none of http.
    """
    folder, limits = Path(folder), limits or Limits()
    names = [Path(path).name for path in lists]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"two of the lists have the same file name ({', '.join(names)}); fetch each to its own folder"
        )
    links = {name: read_links(path) for name, path in zip(names, lists, strict=True)}
    prompts: dict[str, dict[str, list[str]]] = {}
    for name, by_prompt in links.items():
        for prompt, urls in by_prompt.items():
            for url in urls:
                prompts.setdefault(url, {}).setdefault(name, []).append(prompt)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; name one for the images")
    folder.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(folder)
    for url, entry in manifest.items():
        # An entry keeps the prompts of lists that are not asked for now.
        entry["prompts"] = {**entry["prompts"], **prompts.get(url, {})}
    _write(folder, manifest)
    todo = [url for url in prompts if url not in manifest or not _is_settled(folder, manifest[url])]
    _Fetcher(folder, limits, progress).run(todo, prompts)
    manifest = read_manifest(folder)
    _write(folder, manifest)
    return _summary(folder, links, manifest, set(todo))


def _is_settled(folder: Path, entry: Record) -> bool:
    if entry["status"] != "ok":
        return not entry["may_heal"]
    try:
        return hashlib.sha256((folder / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
    except OSError:
        return False


def _write(folder: Path, manifest: dict[str, Record]) -> None:
    write_text(folder / MANIFEST, "".join(json.dumps(entry) + "\n" for entry in manifest.values()))


def _summary(
    folder: Path, links: dict[str, dict[str, tuple[str, ...]]], manifest: dict[str, Record], tried: set[str]
) -> dict[str, Any]:
    urls = list(dict.fromkeys(url for by_prompt in links.values() for some in by_prompt.values() for url in some))
    alive = [url for url in urls if manifest[url]["status"] == "ok"]
    of_prompts = [some for by_prompt in links.values() for some in by_prompt.values() if some]
    by_content: dict[str, list[str]] = {}
    for url in alive:
        by_content.setdefault(manifest[url]["sha256"], []).append(url)
    return {
        "folder": str(folder),
        "links": len(urls),
        "fetched": sum(url in tried for url in alive),
        "kept": sum(url not in tried for url in alive),
        "dead": [manifest[url] for url in urls if manifest[url]["status"] != "ok"],
        "prompts": len(of_prompts),
        "prompts_without_reference": sum(not set(some) & set(alive) for some in of_prompts),
        "same": [some for some in by_content.values() if len(some) > 1],
    }


class _Fetcher:
    def __init__(self, folder: Path, limits: Limits, progress: bool) -> None:
        self.folder, self.limits, self.progress = folder, limits, progress
        self.proxies = _proxies()

    def run(self, urls: Sequence[str], prompts: dict[str, dict[str, list[str]]]) -> None:
        """Fetches links and notes what became of each at once."""
        with warnings.catch_warnings():
            # Pillow only warns of an image that is large enough to be meant to fill the memory.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            asyncio.run(self._run(urls, prompts))

    async def _run(self, urls: Sequence[str], prompts: dict[str, dict[str, list[str]]]) -> None:
        limits = self.limits
        # Names are looked up and images decoded in threads; a name that takes long must not hold up the others.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(limits.parallel))
        self.slots = asyncio.Semaphore(limits.parallel)
        self.hosts: dict[str | None, asyncio.Semaphore] = {}
        self.decoders = asyncio.Semaphore(2)
        self.resolver = aiohttp.ThreadedResolver() if limits.private else _PublicResolver()
        # A proxy is the user's own, so it may have any address.
        direct = self._session(aiohttp.TCPConnector(limit=0, resolver=self.resolver))
        proxied = self._session(aiohttp.TCPConnector(limit=0, resolver=aiohttp.ThreadedResolver()))
        self.sessions = {False: direct, True: proxied}
        columns = (TextColumn("references"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[dead]} dead"))
        bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), disable=not self.progress or not urls)
        line, dead = bar.add_task("", total=len(urls), dead=0), 0
        with (self.folder / MANIFEST).open("a", encoding="utf-8") as manifest, bar:
            async with direct, proxied:
                for done in asyncio.as_completed([self._fetch(url) for url in urls]):
                    entry = await done
                    manifest.write(json.dumps({**entry, "prompts": prompts[entry["url"]]}) + "\n")
                    manifest.flush()
                    dead += entry["status"] == "dead"
                    bar.update(line, advance=1, dead=dead)

    def _session(self, connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
        limits = self.limits
        return aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(limits.total, sock_connect=limits.connect, sock_read=limits.read),
            headers={
                "User-Agent": f"nemo-bench/{version('nemo-bench')}",
                "Accept": "image/*",
                "Accept-Encoding": "identity",
            },
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,  # which would send logins of ~/.netrc
        )

    async def _fetch(self, url: str) -> Record:
        """The entry of a link, tried again while that may help."""
        left, pause = self.limits.retries, self.limits.backoff
        while True:
            try:
                return {"url": url, "status": "ok", **await self._try(url)}
            except _DeadLinkError as error:
                if not error.may_heal or not left or error.wait > self.limits.longest_wait:
                    return {"url": url, "status": "dead", "why": error.why, "may_heal": error.may_heal}
                # By chance, so that links that failed together are not all tried again together.
                await asyncio.sleep(max(error.wait, pause * random.uniform(1, 1.5)))
                left, pause = left - 1, pause * 2

    async def _try(self, url: str) -> Record:
        address = _address(url)
        async with self.hosts.setdefault(address.host, asyncio.Semaphore(self.limits.per_host)), self.slots:
            content = await self._download(address)
            # Within its slot, so that no more than the slots hold waits to be decoded.
            async with self.decoders:
                return await asyncio.to_thread(partial(_save, self.folder, url, content, self.limits))

    async def _download(self, address: URL) -> bytes:
        try:
            # Followed by ourselves, since every address on the way has to be a public one.
            for _ in range(self.limits.redirects + 1):
                proxy = self._proxy(address)
                await self._check_public(address, proxied=proxy is not None)
                session = self.sessions[proxy is not None]
                async with session.get(address, proxy=proxy, allow_redirects=False) as answer:
                    if answer.status not in MOVED or "Location" not in answer.headers:
                        return await self._body(answer)
                    address = _moved(address, answer.headers["Location"])
            raise _DeadLinkError(f"more than {self.limits.redirects} redirections")
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError, UnicodeError):
            raise _DeadLinkError("no http or https address") from None
        except asyncio.TimeoutError:
            raise _DeadLinkError("too slow or no answer", may_heal=True) from None
        except aiohttp.ClientSSLError:
            raise _DeadLinkError("no valid certificate") from None
        except aiohttp.ClientConnectorDNSError:
            raise _DeadLinkError("host not found", may_heal=True) from None
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError):
            raise _DeadLinkError("no connection, or broken off", may_heal=True) from None
        except aiohttp.ClientError as error:
            raise _DeadLinkError(f"no valid answer ({type(error).__name__})") from None

    def _proxy(self, address: URL) -> str | None:
        """The proxy that the environment names for an address, if any."""
        proxy = self.proxies.get(address.scheme)
        return None if proxy is None or proxy_bypass(address.authority) else proxy

    async def _check_public(self, address: URL, *, proxied: bool) -> None:
        """Raises where the host is an address that is not public. Names are checked where they are looked up.

        Behind a proxy names are looked up by the proxy; here they are too, as far as they are known here.
        """
        host = (address.host or "").rstrip(".")
        if self.limits.private:
            return
        if ":" in host or host.rpartition(".")[2].isdigit() or host.rpartition(".")[2].startswith("0x"):
            if not _is_public(host):
                raise _not_public()
        elif proxied:
            with suppress(OSError):
                await self.resolver.resolve(host, address.port or 0, socket.AF_UNSPEC)

    async def _body(self, answer: aiohttp.ClientResponse) -> bytes:
        _check_answer(answer)
        most = int(self.limits.megabytes * 2**20)
        content = bytearray()
        if (answer.content_length or 0) > most:
            raise _DeadLinkError(f"more than {self.limits.megabytes:g} MiB")
        async for chunk in answer.content.iter_chunked(2**16):
            content += chunk
            if len(content) > most:
                raise _DeadLinkError(f"more than {self.limits.megabytes:g} MiB")
        return bytes(content)


class _PublicResolver(AbstractResolver):
    """Looks up the addresses of a host, and lets public ones pass only: those are what is connected to."""

    def __init__(self) -> None:
        self.resolver = aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Public addresses of a host, at least one."""
        found = await self.resolver.resolve(host, port, family)
        public = [result for result in found if _is_public(result["host"])]
        if not public:
            raise _not_public()
        return public

    async def close(self) -> None:
        """Nothing is held."""


def _not_public() -> _DeadLinkError:
    """May be another one another day, or be allowed then; but not in a few seconds."""
    return _DeadLinkError("no public address", may_heal=True, wait=math.inf)


def _is_public(host: str) -> bool:
    """Whether an IP address is one that everybody reaches; also where it stands for an IPv4 address."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        within = address.ipv4_mapped or address.sixtofour
        if address in _NAT64 or int(address) < 2**32:
            within = ipaddress.IPv4Address(int(address) % 2**32)
        if within is not None:
            return _is_public(str(within))
        if address in _NAT64_LOCAL or address.is_site_local:
            return False
    return address.is_global and not address.is_multicast


def _proxies() -> dict[str, str]:
    """Proxies of the environment by scheme.

    Raises:
        ConfigError: One is of a kind that is not supported.
    """
    proxies = {scheme: proxy for scheme, proxy in getproxies().items() if scheme in ("http", "https") and proxy}
    for scheme, proxy in proxies.items():
        if urlsplit(proxy).scheme not in ("http", "https"):
            msg = f"{scheme.upper()}_PROXY={without_login(proxy)}: expected such as http://host:port"
            raise ConfigError(f"{msg}; name such a proxy, or unset it")
    return proxies


def _moved(address: URL, location: str) -> URL:
    """The address that another one names as its new place."""
    moved = _address(urljoin(str(address), location))
    if (address.scheme, moved.scheme) == ("https", "http"):
        raise _DeadLinkError("redirected from https to http")
    return moved


def _address(url: str) -> URL:
    """A link as it is sent: what is quoted stays as it is, since some servers sign it; what must be quoted is.

    A user name and password in it are left out.
    """
    try:
        url = without_login(url)
        parts = urlsplit(url)
        if parts.scheme.lower() not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise _DeadLinkError("no http or https address")
        address = URL(quote(urldefrag(url).url, safe="%/:=&?~+!$,;'@()*[]"), encoded=True)
        if parts.username is not None or address.user is not None:
            raise ValueError
        return address if parts.hostname.isascii() else address.with_host(parts.hostname)
    except ValueError:
        raise _DeadLinkError("no valid address") from None


def _check_answer(answer: aiohttp.ClientResponse) -> None:
    if answer.status != 200:
        may_heal = answer.status in BUSY or answer.status >= 500
        wait = _seconds(answer.headers.get("Retry-After", ""))
        asks = f", asks to wait {wait:.0f} s" if wait else ""
        raise _DeadLinkError(f"answered {answer.status}{asks}", may_heal=may_heal, wait=wait)


def _seconds(retry_after: str) -> float:
    """What a server asks to wait, given in seconds or as a date; 0 where it does not say."""
    if retry_after.isascii() and retry_after.strip().isdigit():
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _save(folder: Path, url: str, content: bytes, limits: Limits) -> Record:
    """Checks that the bytes are an image, whatever they were said to be, and writes them under a lasting name."""
    kind, width, height = _inspect(content, limits)
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.{kind.lower()}"
    part = folder / f"{name}.{os.getpid()}.part"
    part.write_bytes(content)
    part.replace(folder / name)
    return {
        "file": name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "format": kind,
        "width": width,
        "height": height,
    }


def _inspect(content: bytes, limits: Limits) -> tuple[str, int, int]:
    """Format, width and height of an image that can be decoded to its end."""
    Image.init()
    try:
        with Image.open(io.BytesIO(content), formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            width, height = image.size
            if width * height > limits.megapixels * 1e6:
                raise _DeadLinkError(f"more than {limits.megapixels:g} megapixels")
            if min(width, height) < SMALLEST:
                raise _DeadLinkError(f"{width}x{height} pixels stand in for an image")
            to_rgb(image)
            return image.format or FORMATS[0], width, height
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise _DeadLinkError(f"more than {limits.megapixels:g} megapixels") from None
    except _DeadLinkError:
        raise
    except UnidentifiedImageError:
        is_page = content[:256].lstrip().lower().startswith((b"<!doctype html", b"<html"))
        raise _DeadLinkError("a web page, no image" if is_page else "no image of a known format") from None
    except Exception as error:  # Pillow raises many kinds for many kinds of damage
        raise _DeadLinkError(f"damaged image ({error})") from None
