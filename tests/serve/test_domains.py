"""Fetching: which addresses are public, and which domains an entry of --allow-media-domain allows."""

from __future__ import annotations

import pytest

from vtp.engines.errors import UsageError
from vtp.serve.http.pictures.fetching import AllowedDomain, is_public

# -- addresses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "93.184.215.14", "2606:4700::1111", "2a00:1450::1"]
)
def test_public_addresses(address: str) -> None:
    assert is_public(address)


NOT_PUBLIC = """
127.0.0.1 127.255.0.1 0.0.0.0 0.1.2.3 10.0.0.1 172.16.0.1 172.31.255.255 192.168.0.1 169.254.169.254
100.64.0.1 100.127.255.255 192.0.0.1 192.0.2.1 198.18.0.1 198.51.100.1 203.0.113.1 224.0.0.1 239.1.1.1
240.0.0.1 255.255.255.255 192.88.99.1 ::1 :: ::127.0.0.1 ::8.8.8.8 ::ffff:127.0.0.1 ::ffff:8.8.8.8
::ffff:10.0.0.1 64:ff9b::7f00:1 64:ff9b::808:808 64:ff9b:1::1 2002:7f00:1::1 2001::1 fe80::1 fe80::1%lo
fec0::1 fc00::1 fd12::1 ff02::1 2001:db8::1 100::1 3fff::1 2606:4700::1%eth0 localhost 1.2.3"""


@pytest.mark.parametrize("address", NOT_PUBLIC.split())
def test_all_other_addresses_are_refused(address: str) -> None:
    assert not is_public(address)


# -- domains -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "host", "port", "scheme", "allowed"),
    [
        ("example.org", "example.org", 443, "https", True),
        ("example.org", "example.org", 80, "http", True),
        ("Example.ORG", "example.org", 80, "http", True),
        ("example.org", "example.org", 8080, "http", False),
        ("example.org", "example.org", 443, "http", False),
        ("example.org", "www.example.org", 80, "http", False),
        ("example.org", "notexample.org", 80, "http", False),
        ("*.example.org", "www.example.org", 80, "http", True),
        ("*.example.org", "a.b.example.org", 80, "http", True),
        ("*.example.org", "example.org", 80, "http", False),
        ("*.example.org", "notexample.org", 80, "http", False),
        ("example.org:8080", "example.org", 8080, "http", True),
        ("example.org:8080", "example.org", 80, "http", False),
    ],
)
def test_what_an_entry_allows(entry: str, host: str, port: int, scheme: str, allowed: bool) -> None:
    assert AllowedDomain.parse(entry).allows(host, port, scheme) is allowed


@pytest.mark.parametrize(
    "entry", ["", "*", "*.", "https://example.org", "a b", "a/b", "a:0", "a:65536", "a..b", "[::1]"]
)
def test_entries_that_are_not_valid(entry: str) -> None:
    with pytest.raises(UsageError, match="not a valid domain"):
        AllowedDomain.parse(entry)
