"""Downloads reference images from the links of published prompt lists.

Many of these links are dead by now, and servers answer slowly, with a web page, with far too much, or not at all. The
manifest records the outcome of every link, so that missing images are counted wherever a number depends on them.

A list may come from anyone, so a link gets nothing of the user's: no login of ``~/.netrc``, of the link itself or of a
cookie, and no access to addresses that only this machine reaches. Proxies of the environment (``HTTP_PROXY``,
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
import random
import socket
import time
import warnings
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote, urldefrag, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from aiohttp.abc import ResolveResult
from PIL import Image, UnidentifiedImageError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from typing_extensions import override
from yarl import URL

from nemo_bench.errors import ConfigError
from nemo_bench.prompts.lists import without_login
from nemo_bench.prompts.readers import read_links
from nemo_bench.prompts.references import MANIFEST, read_manifest
from nemo_bench.records.images import inspect_image, to_rgb
from nemo_bench.records.io import replacing, write_text
from nemo_bench.records.ranges import Count, Index, NotNegative, Positive, check_ranges

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Accepted image formats, recognized by content."""
SMALLEST = 32
"""Least width and height in pixels; smaller images are placeholders."""
BUSY = frozenset({408, 425, 429})
"""HTTP statuses that, like all from 500 on, may be temporary."""
MOVED = frozenset({301, 302, 303, 307, 308})
"""HTTP statuses of a redirection."""
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_NAT64_LOCAL = ipaddress.ip_network("64:ff9b:1::/48")


@dataclass(frozen=True)
class Limits:
    """Limits of downloads.

    Raises:
        ConfigError: A limit is out of range.
    """

    parallel: Count = 16  #: Links downloaded at a time.
    per_host: Count = 4  #: Links of one host downloaded at a time.
    retries: Index = 3  #: Further tries after a temporary failure.
    #: Seconds before the second try, doubled before each further one; up to half as much is added at random.
    backoff: NotNegative = 1.0
    #: Longest wait in seconds that a server may ask for (``Retry-After``) before its link is given up.
    longest_wait: NotNegative = 60.0
    connect: Positive = 10.0  #: Seconds to connect.
    read: Positive = 20.0  #: Seconds without a single byte.
    total: Positive = 90.0  #: Seconds of a try.
    megabytes: Positive = 32.0  #: Size of an image file, in units of 2^20 bytes.
    megapixels: Positive = 64.0  #: Pixels of an image, in millions.
    redirects: Index = 5  #: Redirections followed.
    #: Whether addresses that are not public are allowed, such as those of this machine and its network.
    private: bool = False

    def __post_init__(self) -> None:
        check_ranges(type(self).__name__, type(self), vars(self))


@dataclass(eq=False)
class _DeadLinkError(Exception):
    """A link gives no image: why, whether another try may succeed, and the seconds that the server asks to wait."""

    why: str
    may_heal: bool = False
    wait: float = 0.0


def fetch(
    lists: Sequence[Path | str], folder: Path | str, limits: Limits | None = None, *, progress: bool = True
) -> dict[str, Any]:
    """Downloads the reference images that prompt lists link to, each link once.

    Files that are in the folder with their recorded checksum are kept. Dead links are tried again only after a
    temporary failure.

    Args:
        lists: Prompt files with a column ``url`` or ``urls``.
        folder: Of the images and their manifest (:func:`nemo_bench.prompts.read_manifest`), of other lists as well.
        limits: None for the defaults.
        progress: Whether to show a progress bar.

    Returns:
        ``folder``; ``links``, their number; ``fetched`` now and ``kept`` from before; ``dead``, the manifest's entries
        of dead links; ``prompts`` with links, and ``prompts_without_reference`` with dead links only; ``same``, groups
        of links with identical files, which may be placeholders of lost images.

    Raises:
        PromptError: A list can't be read or has no links.
        ConfigError: Two lists have the same file name, the folder is a file, or a proxy is not of http.
    """
    folder = Path(folder)
    names = [Path(path).name for path in lists]
    if len(set(names)) < len(names):
        msg = f"two of the lists have the same file name ({', '.join(names)}); fetch each to its own folder"
        raise ConfigError(msg)
    links = {name: read_links(path) for name, path in zip(names, lists, strict=True)}
    owners: dict[str, dict[str, list[str]]] = {}
    for name, by_prompt in links.items():
        for prompt, urls in by_prompt.items():
            for url in urls:
                owners.setdefault(url, {}).setdefault(name, []).append(prompt)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; name one for the images")
    folder.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(folder)
    for url, entry in manifest.items():
        # An entry keeps the prompts of lists that are not asked for now.
        entry["prompts"] = {**entry["prompts"], **owners.get(url, {})}
    _write_manifest(folder, manifest)
    pending = {url: owners[url] for url in owners if url not in manifest or not _is_settled(folder, manifest[url])}
    with warnings.catch_warnings():
        # Pillow only warns of an image that is large enough to be meant to fill the memory.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        asyncio.run(_download_all(pending, folder, limits or Limits(), progress))
    manifest = read_manifest(folder)
    _write_manifest(folder, manifest)
    alive = [url for url in owners if manifest[url]["status"] == "ok"]
    by_content: defaultdict[str, list[str]] = defaultdict(list)
    for url in alive:
        by_content[manifest[url]["sha256"]].append(url)
    linked = [urls for by_prompt in links.values() for urls in by_prompt.values() if urls]
    return {
        "folder": str(folder),
        "links": len(owners),
        "fetched": sum(url in pending for url in alive),
        "kept": sum(url not in pending for url in alive),
        "dead": [manifest[url] for url in owners if manifest[url]["status"] != "ok"],
        "prompts": len(linked),
        "prompts_without_reference": sum(set(urls).isdisjoint(alive) for urls in linked),
        "same": [urls for urls in by_content.values() if len(urls) > 1],
    }


def _write_manifest(folder: Path, manifest: dict[str, dict[str, Any]]) -> None:
    write_text(folder / MANIFEST, "".join(json.dumps(entry) + "\n" for entry in manifest.values()))


def _is_settled(folder: Path, entry: dict[str, Any]) -> bool:
    """Whether a link needs no further try: its file is intact, or its failure is permanent."""
    if entry["status"] != "ok":
        return not entry["may_heal"]
    return inspect_image(folder / entry["file"], decode=False).sha256 == entry["sha256"]


async def _download_all(pending: dict[str, dict[str, list[str]]], folder: Path, limits: Limits, progress: bool) -> None:
    """Downloads links and appends the outcome of each to the manifest at once."""
    # Host names are looked up and images decoded in threads; a slow name must not hold up the others.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(limits.parallel))
    downloader = _Downloader(folder, limits)
    columns = (TextColumn("references"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[dead]} dead"))
    bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), disable=not progress or not pending)
    line = bar.add_task("", total=len(pending), dead=0)
    dead = 0
    with (folder / MANIFEST).open("a", encoding="utf-8") as manifest, bar:
        async with downloader.direct, downloader.proxied:
            for outcome in asyncio.as_completed([downloader.download(url) for url in pending]):
                entry = await outcome
                manifest.write(json.dumps({**entry, "prompts": pending[entry["url"]]}) + "\n")
                manifest.flush()
                dead += entry["status"] == "dead"
                bar.update(line, advance=1, dead=dead)


class _Downloader:
    """Downloads images, within a running event loop."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self.folder = folder
        self.limits = limits
        self.proxies = _proxies()
        self.slots = asyncio.Semaphore(limits.parallel)
        self.hosts = defaultdict[str | None, asyncio.Semaphore](lambda: asyncio.Semaphore(limits.per_host))
        self.decoders = asyncio.Semaphore(2)
        self.resolver = aiohttp.ThreadedResolver() if limits.private else _PublicResolver()
        self.direct = _session(limits, self.resolver)
        # A proxy is the user's own, so it may have any address.
        self.proxied = _session(limits, aiohttp.ThreadedResolver())

    async def download(self, url: str) -> dict[str, Any]:
        """Downloads a link, with further tries after temporary failures, and returns its entry in the manifest."""
        tries = 0
        while True:
            try:
                return {"url": url, "status": "ok", **await self._try(url)}
            except _DeadLinkError as error:
                if not error.may_heal or tries == self.limits.retries or error.wait > self.limits.longest_wait:
                    return {"url": url, "status": "dead", "why": error.why, "may_heal": error.may_heal}
                # At random, so that links that failed together are not all tried again together.
                pause = self.limits.backoff * 2**tries * random.uniform(1, 1.5)
                await asyncio.sleep(max(error.wait, pause))
                tries += 1

    async def _try(self, url: str) -> dict[str, Any]:
        address = _address(url)
        async with self.hosts[address.host], self.slots:
            content = await self._content(address)
            # Within its slot, so that no more images than slots wait to be decoded.
            async with self.decoders:
                return await asyncio.to_thread(_save, self.folder, url, content, self.limits)

    async def _content(self, address: URL) -> bytes:
        try:
            # Redirections are followed here, since every address on the way has to be public.
            for _ in range(self.limits.redirects + 1):
                proxy = self.proxies.get(address.scheme)
                if proxy is not None and proxy_bypass(address.authority):
                    proxy = None
                if not self.limits.private:
                    await self._check_public(address, proxied=proxy is not None)
                session = self.direct if proxy is None else self.proxied
                async with session.get(address, proxy=proxy, allow_redirects=False) as answer:
                    if answer.status not in MOVED or "Location" not in answer.headers:
                        return await _body(answer, self.limits.megabytes)
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

    async def _check_public(self, address: URL, *, proxied: bool) -> None:
        """Refuses hosts that are no public IP address. Names are checked by the resolver of the session.

        A proxy resolves names itself; they are checked as far as this machine can resolve them too.
        """
        host = (address.host or "").rstrip(".")
        last = host.rpartition(".")[2]
        if ":" in host or last.isdigit() or last.startswith("0x"):
            if not _is_public(host):
                raise _not_public()
        elif proxied:
            with suppress(OSError):
                await self.resolver.resolve(host, address.port or 0, socket.AF_UNSPEC)


class _PublicResolver(aiohttp.ThreadedResolver):
    """Resolves host names to public addresses only, which are then the ones connected to."""

    @override
    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        public = [found for found in await super().resolve(host, port, family) if _is_public(found["host"])]
        if not public:
            raise _not_public()
        return public


def _session(limits: Limits, resolver: aiohttp.ThreadedResolver) -> aiohttp.ClientSession:
    """A session without cookies and logins."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, resolver=resolver),
        timeout=aiohttp.ClientTimeout(limits.total, sock_connect=limits.connect, sock_read=limits.read),
        headers={
            "User-Agent": f"nemo-bench/{version('nemo-bench')}",
            "Accept": "image/*",
            "Accept-Encoding": "identity",
        },
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,  # which would send logins of ~/.netrc
    )


def _not_public() -> _DeadLinkError:
    """Heals if the address changes or private ones are allowed, but not within a few seconds."""
    return _DeadLinkError("no public address", may_heal=True, wait=math.inf)


def _is_public(host: str) -> bool:
    """Whether a text is a public IP address; an IPv6 address that embeds an IPv4 address counts as that."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        embedded = address.ipv4_mapped or address.sixtofour
        if address in _NAT64 or int(address) < 2**32:
            embedded = ipaddress.IPv4Address(int(address) % 2**32)
        if embedded is not None:
            return _is_public(str(embedded))
        if address in _NAT64_LOCAL or address.is_site_local:
            return False
    return address.is_global and not address.is_multicast


def _proxies() -> dict[str, str]:
    """Proxies of the environment by scheme; one of an unsupported kind is a ConfigError."""
    proxies = {scheme: proxy for scheme, proxy in getproxies().items() if scheme in ("http", "https") and proxy}
    for scheme, proxy in proxies.items():
        if urlsplit(proxy).scheme not in ("http", "https"):
            msg = f"{scheme.upper()}_PROXY={without_login(proxy)}: expected such as http://host:port"
            raise ConfigError(f"{msg}; name such a proxy, or unset it")
    return proxies


def _moved(address: URL, location: str) -> URL:
    """Target of a redirection."""
    moved = _address(urljoin(str(address), location))
    if (address.scheme, moved.scheme) == ("https", "http"):
        raise _DeadLinkError("redirected from https to http")
    return moved


def _address(url: str) -> URL:
    """Address of a link, without user name and password.

    Quoted characters stay as they are, since some servers sign them; others are quoted where necessary.
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


async def _body(answer: aiohttp.ClientResponse, megabytes: float) -> bytes:
    """Body of an answer, no more than some units of 2^20 bytes."""
    if answer.status != 200:
        may_heal = answer.status in BUSY or answer.status >= 500
        wait = _seconds(answer.headers.get("Retry-After", ""))
        asks = f", asks to wait {wait:.0f} s" if wait else ""
        raise _DeadLinkError(f"answered {answer.status}{asks}", may_heal=may_heal, wait=wait)
    too_large = _DeadLinkError(f"more than {megabytes:g} MiB")
    if (answer.content_length or 0) > megabytes * 2**20:
        raise too_large
    content = bytearray()
    async for chunk in answer.content.iter_chunked(2**16):
        content += chunk
        if len(content) > megabytes * 2**20:
            raise too_large
    return bytes(content)


def _seconds(retry_after: str) -> float:
    """Wait that a server asks for, as seconds or date; 0 if it does not."""
    seconds = retry_after.strip()
    if seconds.isascii() and seconds.isdigit():
        return float(seconds)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _save(folder: Path, url: str, content: bytes, limits: Limits) -> dict[str, Any]:
    """Checks that bytes are an image, writes them under a name that depends on the link, and returns their entry."""
    image_format, size = _inspect(content, limits)
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.{image_format.lower()}"
    with replacing(folder / name) as part:
        part.write_bytes(content)
    return {
        "file": name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "format": image_format,
        "width": size[0],
        "height": size[1],
    }


def _inspect(content: bytes, limits: Limits) -> tuple[str, tuple[int, int]]:
    """Format, width and height of an image that can be decoded to its end."""
    too_large = _DeadLinkError(f"more than {limits.megapixels:g} megapixels")
    Image.init()
    try:
        with Image.open(io.BytesIO(content), formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            if image.width * image.height > limits.megapixels * 1e6:
                raise too_large
            if min(image.size) < SMALLEST:
                raise _DeadLinkError(f"{image.width}x{image.height} pixels stand in for an image")
            to_rgb(image)
            return image.format or FORMATS[0], image.size
    except _DeadLinkError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise too_large from None
    except UnidentifiedImageError:
        is_page = content[:256].lstrip().lower().startswith((b"<!doctype html", b"<html"))
        raise _DeadLinkError("a web page, no image" if is_page else "no image of a known format") from None
    except Exception as error:  # Pillow raises many kinds for many kinds of damage
        raise _DeadLinkError(f"damaged image ({error})") from None
