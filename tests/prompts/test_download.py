"""Downloads of reference images from a real, misbehaving server on the loopback."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from yarl import URL

from misbehaving import Server, picture, serve
from nemo_bench.cli import main
from nemo_bench.errors import ConfigError, PromptError
from nemo_bench.prompts import MANIFEST, dead_references, download, read_links, read_manifest, read_prompts
from nemo_bench.prompts.download import Limits, _address, _is_public, _moved, _seconds, fetch

QUICK = Limits(private=True, retries=2, backoff=0.01, connect=1, read=0.4, total=3, megabytes=1, megapixels=1)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[Server]:
    with serve() as server:
        yield server


def write_list(folder: Path, urls: list[Any], name: str = "list.jsonl") -> Path:
    path = folder / name
    rows = [{"id": f"p{number}", "text": f"prompt {number}", "url": url} for number, url in enumerate(urls)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def fetch_all(folder: Path, urls: list[Any], limits: Limits = QUICK, name: str = "list.jsonl") -> dict[str, Any]:
    return fetch([write_list(folder, urls, name)], folder / "images", limits, progress=False)


def fetch_one(folder: Path, url: str, limits: Limits = QUICK) -> dict[str, Any]:
    fetch_all(folder, [url], limits)
    return read_manifest(folder / "images")[url]


@pytest.mark.parametrize("path", ["good.png", "jpeg.jpg", "lying.png", "moved.png", "quoted/a%2Cb%20c.png?sign=%7E%2B"])
def test_an_image_is_kept_as_it_was_sent(tmp_path: Path, server: Server, path: str) -> None:
    entry = fetch_one(tmp_path, server.url(path))
    content = (tmp_path / "images" / entry["file"]).read_bytes()
    expected = {"jpeg.jpg": picture("blue", "JPEG"), "lying.png": picture("green")}.get(path, picture())
    assert content == expected
    assert entry["status"] == "ok"
    assert entry["sha256"] == hashlib.sha256(expected).hexdigest()
    assert (entry["bytes"], entry["width"], entry["height"]) == (len(expected), 48, 40)
    assert entry["format"] == ("JPEG" if path == "jpeg.jpg" else "PNG")
    assert entry["prompts"] == {"list.jsonl": ["p0"]}


LASTING = {
    "missing.png": "answered 404",
    "page.jpg": "a web page, no image",
    "text.jpg": "no image of a known format",
    "svg.png": "no image of a known format",
    "postscript.png": "no image of a known format",
    "pixel.png": "1x1 pixels stand in for an image",
    "bomb.png": "more than 1 megapixels",
    "large.png": "more than 1 megapixels",
    "huge.png": "more than 1 MiB",
    "endless.png": "more than 1 MiB",
    "zipped.png": "more than 1 MiB",
    "loop.png": "more than 5 redirections",
    "to_file.png": "no http or https address",
    "garbage.png": "no valid answer",
    "cut.jpg": "damaged image (image file is truncated",
}
HEALING = {
    "silent.png": "too slow or no answer",
    "drip.png": "too slow or no answer",
    "drip_head.png": "too slow or no answer",
    "short.png": "no connection, or broken off",
    "reset.png": "no connection, or broken off",
    "broken.png": "answered 500",
}


@pytest.mark.parametrize("path", LASTING)
def test_a_link_with_a_permanent_failure_is_tried_once(tmp_path: Path, server: Server, path: str) -> None:
    entry = fetch_one(tmp_path, server.url(path))
    assert entry["status"] == "dead"
    assert entry["why"].startswith(LASTING[path])
    assert not entry["may_heal"]
    assert server.seen[f"/{path}"] == (6 if path == "loop.png" else 1)
    assert [file.name for file in (tmp_path / "images").iterdir()] == [MANIFEST]


@pytest.mark.parametrize("path", HEALING)
def test_a_link_with_a_temporary_failure_is_tried_again_and_given_up(tmp_path: Path, server: Server, path: str) -> None:
    start = time.monotonic()
    entry = fetch_one(tmp_path, server.url(path), Limits(private=True, retries=1, backoff=0.01, read=0.4, total=0.6))
    assert time.monotonic() - start < 5
    assert (entry["status"], entry["why"], entry["may_heal"]) == ("dead", HEALING[path], True)
    # The library itself asks once more where a connection breaks before the answer.
    assert server.seen[f"/{path}"] == (4 if path == "reset.png" else 2)
    assert [file.name for file in (tmp_path / "images").iterdir()] == [MANIFEST]


def test_an_endless_body_is_not_read_to_the_end(tmp_path: Path, server: Server) -> None:
    fetch_one(tmp_path, server.url("endless.png"))
    assert server.sent < 32 * 2**20  # the limit and what the buffers of two sockets hold


@pytest.mark.parametrize(("path", "tries"), [("busy.png", 3), ("short_once.png", 2)])
def test_a_link_that_heals_is_downloaded(tmp_path: Path, server: Server, path: str, tries: int) -> None:
    assert fetch_one(tmp_path, server.url(path))["status"] == "ok"
    assert server.seen[f"/{path}"] == tries


def test_a_wait_that_the_server_asks_for_is_kept(tmp_path: Path, server: Server) -> None:
    assert fetch_one(tmp_path, server.url("later.png"))["status"] == "ok"
    first, second = server.asked
    assert second - first >= 1


def test_a_link_whose_server_asks_for_an_hour_is_given_up(tmp_path: Path, server: Server) -> None:
    entry = fetch_one(tmp_path, server.url("date.png"))
    assert entry["why"].startswith("answered 429, asks to wait 3")
    assert entry["may_heal"]
    assert server.seen["/date.png"] == 1


def test_a_link_to_a_closed_port_may_heal(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        entry = fetch_one(tmp_path, f"http://127.0.0.1:{free.getsockname()[1]}/a.png")
    assert (entry["why"], entry["may_heal"]) == ("no connection, or broken off", True)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/hostname",
        "ftp://127.0.0.1/a.png",
        "data:image/png;base64,AA",
        "a.png",
        "http://",
        "http://[1/",
        "//a",
    ],
)
def test_only_web_addresses_are_followed(tmp_path: Path, url: str) -> None:
    entry = fetch_one(tmp_path, url)
    assert entry["why"] in ("no http or https address", "no valid address")
    assert not entry["may_heal"]


@pytest.mark.parametrize("url", ["http://.example/a.png", f"http://{'a' * 70}.example/a.png", "http://a:99999/b.png"])
def test_links_to_impossible_hosts_are_dead(tmp_path: Path, url: str) -> None:
    assert fetch_one(tmp_path, url)["status"] == "dead"


def test_a_link_to_an_unknown_host_may_heal(tmp_path: Path) -> None:
    entry = fetch_one(tmp_path, "http://nowhere.invalid/a.png", Limits(private=True, retries=0))
    assert (entry["why"], entry["may_heal"]) == ("host not found", True)


def test_links_are_downloaded_once_and_few_at_a_time_of_each_host(tmp_path: Path, server: Server) -> None:
    urls = [server.url(f"slow/{number % 10}.png") for number in range(20)]
    summary = fetch_all(tmp_path, urls, Limits(private=True, parallel=8, per_host=3))
    assert len(server.seen) == 10
    assert set(server.seen.values()) == {1}
    assert server.at_once == 3
    assert (summary["links"], summary["fetched"], summary["prompts"]) == (10, 10, 20)
    prompts = read_prompts(tmp_path / "list.jsonl", references=tmp_path / "images")
    assert prompts[0].references == prompts[10].references != prompts[1].references
    assert read_manifest(tmp_path / "images")[urls[0]]["prompts"] == {"list.jsonl": ["p0", "p10"]}
    assert sorted(map(len, summary["same"])) == [10]


def test_prompts_get_their_images_and_dead_links(tmp_path: Path, server: Server) -> None:
    good, blue, gone, page = (server.url(path) for path in ("good.png", "jpeg.jpg", "missing.png", "page.jpg"))
    summary = fetch_all(tmp_path, [[good, gone], blue, [gone, page], None])
    assert (summary["fetched"], len(summary["dead"]), summary["prompts_without_reference"]) == (2, 2, 1)
    prompts = read_prompts(tmp_path / "list.jsonl", references=tmp_path / "images")
    assert [len(prompt.references) for prompt in prompts] == [1, 1, 0, 0]
    assert [prompt.dead_references for prompt in prompts] == [(gone,), (), (gone, page), ()]
    assert dead_references(prompts) == [gone, page]
    with Image.open(prompts[1].references[0]) as image:
        assert image.format == "JPEG"


def test_the_list_may_lie_beside_its_images(tmp_path: Path, server: Server) -> None:
    path = write_list(tmp_path, [server.url("good.png")])
    fetch([path], tmp_path, QUICK, progress=False)
    assert len(read_prompts(path)[0].references) == 1


def test_intact_files_are_kept_and_temporary_failures_tried_again(tmp_path: Path, server: Server) -> None:
    urls = [server.url(path) for path in ("good.png", "jpeg.jpg", "missing.png", "broken.png", "later.png")]
    limits = Limits(private=True, retries=0)
    assert fetch_all(tmp_path, urls, limits)["fetched"] == 2
    images = tmp_path / "images"
    (images / read_manifest(images)[urls[1]]["file"]).write_bytes(b"altered")
    summary = fetch_all(tmp_path, urls, limits)
    counts = {
        path: server.seen[f"/{path}"] for path in ("good.png", "jpeg.jpg", "missing.png", "broken.png", "later.png")
    }
    assert counts == {"good.png": 1, "jpeg.jpg": 2, "missing.png": 1, "broken.png": 2, "later.png": 2}
    assert (summary["kept"], summary["fetched"], len(summary["dead"])) == (1, 2, 2)
    assert len((images / MANIFEST).read_text().splitlines()) == len(urls)


def test_one_folder_serves_several_lists(tmp_path: Path, server: Server) -> None:
    first = write_list(tmp_path, [server.url("good.png")], "a.jsonl")
    second = write_list(tmp_path, [server.url("jpeg.jpg"), server.url("good.png")], "b.jsonl")
    fetch([first], tmp_path / "images", QUICK, progress=False)
    assert not read_prompts(second, limit=1, references=tmp_path / "images")[0].references
    fetch([second], tmp_path / "images", QUICK, progress=False)
    assert server.seen["/good.png"] == 1
    assert read_manifest(tmp_path / "images")[server.url("good.png")]["prompts"] == {
        "a.jsonl": ["p0"],
        "b.jsonl": ["p1"],
    }
    assert all(p.references for path in (first, second) for p in read_prompts(path, references=tmp_path / "images"))


def test_links_that_were_not_tried_are_an_error(tmp_path: Path, server: Server) -> None:
    fetch_all(tmp_path, [server.url("good.png")])
    path = write_list(tmp_path, [server.url("good.png"), server.url("jpeg.jpg")])
    with pytest.raises(PromptError, match=r"1 of 2 links were not tried yet.*nemo-bench references"):
        read_prompts(path, references=tmp_path / "images")
    with pytest.raises(PromptError, match=f"holds no {MANIFEST}"):
        read_prompts(path, references=tmp_path)


def test_a_killed_download_goes_on(tmp_path: Path, server: Server) -> None:
    path = write_list(tmp_path, [server.url(f"slow/{number}.png") for number in range(12)])
    limits = "Limits(private=True, parallel=1)"
    code = f"from nemo_bench.prompts.download import *; fetch([{str(path)!r}], {str(tmp_path / 'images')!r}, {limits})"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "COLUMNS": "80"}, stdout=subprocess.PIPE
    )
    try:
        while sum(server.seen.values()) < 4:
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]
    manifest = tmp_path / "images" / MANIFEST
    with manifest.open("a") as file:
        file.write('{"url": "torn')
    before = sum(server.seen.values())
    summary = fetch([path], tmp_path / "images", QUICK, progress=False)
    assert summary["kept"] >= 2
    assert sum(server.seen.values()) - before == summary["fetched"] == 12 - summary["kept"]
    assert len(read_manifest(tmp_path / "images")) == 12


@pytest.mark.parametrize(
    ("cell", "links"),
    [
        ("https://a.example/1.jpg", ("https://a.example/1.jpg",)),
        (
            "['https://a.example/1.jpg', \"https://a.example/o'2.jpg\"]",
            ("https://a.example/1.jpg", "https://a.example/o'2.jpg"),
        ),
        (["a", "b", "a"], ("a", "b")),
        ([], ()),
        (" ", ()),
    ],
)
def test_links_are_read_in_any_form(tmp_path: Path, cell: Any, links: tuple[str, ...]) -> None:
    assert read_links(write_list(tmp_path, [cell, "x"]))["p0"] == links


@pytest.mark.parametrize("cell", ["['a'", "[1]", "[a]", 7, {"a": "b"}])
def test_cells_without_valid_links_are_an_error(tmp_path: Path, cell: Any) -> None:
    with pytest.raises(PromptError, match=r"list.jsonl, line 1"):
        read_links(write_list(tmp_path, [cell, "x"]))


def test_a_list_without_links_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"no prompt has a link.*Accepted names: url, urls"):
        fetch_all(tmp_path, [None])
    assert not (tmp_path / "images").exists()


def test_lists_of_one_name_and_impossible_limits_are_errors(tmp_path: Path) -> None:
    path = write_list(tmp_path, ["http://a"])
    with pytest.raises(ConfigError, match="same file name"):
        fetch([path, path], tmp_path)
    with pytest.raises(ConfigError, match="is no folder"):
        fetch([path], path)
    with pytest.raises(ConfigError, match="Limits: retries=-1; expected greater than or equal to 0"):
        Limits(retries=-1)
    with pytest.raises(ConfigError, match="Limits: total=0; expected greater than 0"):
        Limits(total=0)


@pytest.fixture
def netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "netrc"
    path.write_text("default login user password secret\n")
    path.chmod(0o600)
    monkeypatch.setenv("NETRC", str(path))


@pytest.mark.usefixtures("netrc")
def test_no_login_is_sent_or_kept(tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    login = server.url("").replace("//", "//user:secret@")
    urls = [server.url("good.png"), f"{login}jpeg.jpg", f"{login}missing.png", server.url(f"to?{login}good.png")]
    summary = fetch_all(tmp_path, urls)
    assert (summary["fetched"], len(summary["dead"])) == (3, 1)
    assert server.seen["/good.png"] == 2
    assert server.logins == []
    prompts = read_prompts(tmp_path / "list.jsonl", references=tmp_path / "images")
    assert [len(prompt.references) for prompt in prompts] == [1, 1, 0, 1]
    assert prompts[2].dead_references == (server.url("missing.png"),)
    assert main(["references", str(tmp_path / "list.jsonl"), str(tmp_path / "images"), "--private"]) == 0
    manifest = (tmp_path / "images" / MANIFEST).read_text()
    assert "jpeg.jpg" in manifest
    for text in (manifest, json.dumps(summary), str(prompts), *capsys.readouterr()):
        # A redirection is part of a link that somebody else wrote; what is in its query is not told apart.
        assert "secret" not in text.replace(urls[3], "")


PUBLIC = ["8.8.8.8", "93.184.215.14", "2606:2800:220:1::1", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"]
PRIVATE = [
    *("127.0.0.1", "127.1.2.3", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1"),
    *("224.0.0.1", "240.0.0.1", "255.255.255.255", "198.18.0.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1"),
    *("fec0::1", "ff02::1", "::ffff:127.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::1", "2002:7f00:1::1"),
    *("127.1", "2130706433", "0x7f000001", "0177.0.0.1", "a.example", ""),
]


@pytest.mark.parametrize("address", [*PUBLIC, *PRIVATE])
def test_public_addresses_are_told_from_others(address: str) -> None:
    """Of the registries of special addresses of IANA (RFC 6890), and of forms that stand for an IPv4 address."""
    assert _is_public(address) == (address in PUBLIC)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1.", "localhost", "127.1", "2130706433", "0x7f000001", "[::1]", "[::ffff:127.0.0.1]"]
)
def test_this_machine_is_not_asked_unless_allowed(tmp_path: Path, server: Server, host: str) -> None:
    url = server.url("good.png").replace("127.0.0.1", host)
    entry = fetch_one(tmp_path, url, Limits(backoff=100))
    assert (entry["status"], entry["why"]) == ("dead", "no public address")
    assert not server.seen
    if host in ("127.0.0.1", "localhost"):
        assert fetch_one(tmp_path, url)["status"] == "ok"


@pytest.fixture
def inner(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server of the network within, on the port of the other one, which counts as a public one now."""
    monkeypatch.setattr(download, "_is_public", lambda host: host == "127.0.0.1")
    with serve("127.0.0.2", int(server.server_address[1])) as inner:
        yield inner


def answer_names(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> None:
    """Has every name found at these addresses, at the last ones from then on."""
    left = list(answers)

    def found(host: str, port: int, *_: object, **__: object) -> list[tuple[Any, ...]]:
        addresses = left.pop(0) if len(left) > 1 else left[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", found)


@pytest.mark.skipif(sys.platform != "linux", reason="the loopback has one address")
def test_redirections_lead_to_public_addresses_only(
    tmp_path: Path, server: Server, inner: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fetch_one(tmp_path, server.url("moved.png"), Limits())["status"] == "ok"
    assert fetch_one(tmp_path, server.url(f"to?{inner.url('good.png')}"), Limits())["why"] == "no public address"
    answer_names(monkeypatch, ["127.0.0.2"])
    port = server.server_address[1]
    assert fetch_one(tmp_path, server.url(f"to?http://a.example:{port}/good.png"), Limits())["status"] == "dead"
    assert fetch_one(tmp_path, f"http://b.example:{port}/good.png", Limits())["why"] == "no public address"
    assert not inner.seen


@pytest.mark.skipif(sys.platform != "linux", reason="the loopback has one address")
def test_the_address_that_was_checked_is_the_one_connected_to(
    tmp_path: Path, server: Server, inner: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_names(monkeypatch, ["127.0.0.2", "127.0.0.1"], ["127.0.0.2"])  # another answer to who asks again
    url = f"http://a.example:{server.server_address[1]}/good.png"
    assert fetch_one(tmp_path, url, Limits())["status"] == "ok"
    assert (sum(server.seen.values()), sum(inner.seen.values())) == (1, 0)


def test_no_redirection_leaves_encryption() -> None:
    assert str(_moved(URL("https://a.example/x/y.png"), "../z.png")) == "https://a.example/z.png"
    assert str(_moved(URL("http://a.example/x"), "https://u:p@b.example/z?q=1%2C2")) == "https://b.example/z?q=1%2C2"
    with pytest.raises(Exception, match="redirected from https to http"):
        _moved(URL("https://a.example/x"), "http://a.example/x")


@pytest.mark.usefixtures("netrc")
def test_proxies_of_the_environment_are_used(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url("").replace("//", "//me:own@"))
    monkeypatch.setenv("no_proxy", "direct.invalid")
    found = [
        fetch_one(tmp_path, url, Limits(retries=0))["status" if number < 1 else "why"]
        for number, url in enumerate(
            [
                "http://images.invalid/good.png",
                "http://10.0.0.1/a.png",
                "http://localhost/b.png",
                "http://direct.invalid/c.png",
            ]
        )
    ]
    assert found == ["ok", "no public address", "no public address", "host not found"]
    assert dict(server.seen) == {"http://images.invalid/good.png": 1}
    assert server.logins == ["Basic " + base64.b64encode(b"me:own").decode()]  # the user's own, for the proxy


def test_proxies_of_other_kinds_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "socks5://me:secret@proxy.invalid:1080")
    with pytest.raises(ConfigError, match=r"HTTPS_PROXY=socks5://proxy\.invalid:1080: expected such as http://host"):
        fetch_all(tmp_path, ["http://a.invalid/a.png"])


@given(st.text(min_size=1))
def test_any_text_is_an_ascii_address_or_a_dead_link(text: str) -> None:
    for url in (text, f"http://a.example/{text}", f"http://{text}/"):
        try:
            assert str(_address(url)).isascii()
        except Exception as error:
            assert type(error).__name__ == "_DeadLinkError"  # noqa: PT017 - the class is private


@given(st.text())
@example("0\x1f")  # which strip() takes off, and float() does not
def test_any_text_of_retry_after_gives_seconds(text: str) -> None:
    assert _seconds(text) >= 0


def test_the_command_prints_counts_and_reasons(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_list(tmp_path, [server.url(name) for name in ("good.png", "slow.png", "missing.png")])
    words = ["references", str(path), str(tmp_path / "images"), "--retries", "0", "--private"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "3 links: 2 fetched, 0 kept, 1 dead" in out
    assert f"dead: {server.url('missing.png')}" in out
    assert "1  answered 404" in out
    assert "2 links gave 1 files" in out
    assert "1 of 3 prompts have no training image left" in out
    assert main([*words, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["kept"], [entry["why"] for entry in summary["dead"]]) == (2, ["answered 404"])
    assert main([*words, "--total", "0"]) == 1
    assert "total=0.0; expected greater than 0" in capsys.readouterr().err
