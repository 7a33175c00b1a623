"""Loopback and proxies, against the libraries that read the variables; addresses."""

import os
import socket
from urllib import request

import httpx
import pytest

from quickbloom.common.errors import ConfigError
from quickbloom.common.system import loopback

PROXY = "http://127.0.0.1:9"


def excepted(monkeypatch: pytest.MonkeyPatch, given: dict[str, str]) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    for name, value in loopback.direct().items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("no", [{}, {"NO_PROXY": "a.org"}, {"no_proxy": "a.org"}, {"no_proxy": " a.org , .b.org ,"}])
@pytest.mark.parametrize("proxy", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_urllib_and_httpx_reach_loopback_without_a_proxy(
    monkeypatch: pytest.MonkeyPatch, no: dict[str, str], proxy: str
) -> None:
    excepted(monkeypatch, {proxy: PROXY, **no})
    for host in ("127.0.0.1", "localhost", "127.0.0.1:8000", "::1"):
        assert request.proxy_bypass_environment(host, request.getproxies_environment())  # type: ignore[attr-defined]
    client = httpx.Client()
    direct = client._transport_for_url(httpx.URL("http://elsewhere.org")) is client._transport
    assert not direct
    for address in ("http://127.0.0.1:8000", "http://localhost:1", "http://[::1]:2"):
        used = client._transport_for_url(httpx.URL(address))
        assert used is client._transport
    assert bool(no) == (client._transport_for_url(httpx.URL("http://a.org")) is client._transport)


@pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY"])
def test_a_star_stays_alone_and_excepts_everything(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    excepted(monkeypatch, {"http_proxy": PROXY, name: "*"})
    assert {os.environ["no_proxy"], os.environ["NO_PROXY"]} == {"*"}


def test_what_grpc_alone_reads_is_added_to_only_where_it_is_set() -> None:
    assert "no_grpc_proxy" not in loopback.direct({})
    assert loopback.direct({"no_grpc_proxy": "x"})["no_grpc_proxy"] == "x,127.0.0.1,localhost,::1"
    assert loopback.direct({"no_proxy": "127.0.0.1"})["NO_PROXY"] == "127.0.0.1,localhost,::1"


def test_socks_proxies_are_turned_off_where_httpx_cannot_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loopback, "find_spec", lambda name: None)
    given = {"ALL_PROXY": "socks5://x:1", "https_proxy": "SOCKS5h://x:1", "http_proxy": PROXY, "no_proxy": "socks"}
    assert loopback.without_socks({key: value for key, value in given.items() if key != "no_proxy"}) == {
        "ALL_PROXY": "",
        "https_proxy": "",
    }
    monkeypatch.setenv("ALL_PROXY", given["ALL_PROXY"])
    with pytest.raises(
        ConfigError, match=r"`ALL_PROXY` names needs socksio, which is not installed: run pip install 'httpx\[so"
    ):
        loopback.check_socks("fl.example.org:8000")
    loopback.check_socks("127.0.0.1:8000")
    assert os.environ["ALL_PROXY"] == ""
    monkeypatch.setattr(loopback, "find_spec", lambda name: object())
    loopback.check_socks("fl.example.org:8000")
    assert loopback.without_socks(given) == {}


@pytest.mark.parametrize(
    ("address", "expected"),
    [("fl.example.org:9092", ("fl.example.org", 9092)), ("[::1]:9092", ("::1", 9092)), ("10.0.0.1:1", ("10.0.0.1", 1))],
)
def test_addresses_are_taken_apart_and_put_together(address: str, expected: tuple[str, int]) -> None:
    assert loopback.split_address("--server", address, "x:1") == expected
    assert loopback.joined(*expected) == address


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("::1:9092", r"must have an IPv6 address in brackets, such as \[::1\]:9092, got '::1:9092'"),
        *((bad, "must be HOST:PORT, such as x:1") for bad in ("x", "x:", ":1", "[]:1", "x:0", "x:65536", "x:²", "x:-1", "")),
    ],
)
def test_what_is_no_address_is_refused(address: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        loopback.split_address("--server", address, "x:1")


def test_a_machine_without_ipv4_is_told_what_to_add(monkeypatch: pytest.MonkeyPatch) -> None:
    loopback.check_ipv4("a node")

    def bind(self: socket.socket, address: object) -> None:
        raise OSError(99, "Cannot assign requested address")

    monkeypatch.setattr(socket.socket, "bind", bind)
    with pytest.raises(
        ConfigError, match=r"a node needs the address 127\.0\.0\.1 .*`ip address add 127\.0\.0\.1/8 dev lo`, or x"
    ):
        loopback.check_ipv4("a node", ", or x")
