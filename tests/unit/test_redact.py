"""Passwords of URIs are shown nowhere; everything else stays as it is."""

from __future__ import annotations

from types import MappingProxyType

import pytest

from pipelines.redact import redact

pytestmark = pytest.mark.security


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://key:secret@bucket/a", "s3://***@bucket/a"),
        ("http://me:p@ss@host/a?b=c@d", "http://***@host/a?b=c@d"),
        ("at s3://k:s@b/x and s3://k:s@b/y", "at s3://***@b/x and s3://***@b/y"),
        ("https://h/f?sig=AB%2F&se=1", "https://h/f?sig=***&se=1"),
        ("s3://b/a?region=x&secret_key=hush", "s3://b/a?region=x&secret_key=***"),
        ("https://h/f?X-Amz-Signature=a&x=1", "https://h/f?X-Amz-Signature=***&x=1"),
        ("https://h/f?TOKEN=a", "https://h/f?TOKEN=***"),
        ("https://h/f?password=a&passwd=b", "https://h/f?password=***&passwd=***"),
        ("https://h/f?b=1&design=x", "https://h/f?b=1&design=***"),
        ("mail me@host, a=b&c=d", "mail me@host, a=b&c=d"),
        ("", ""),
    ],
)
def test_credentials_and_secret_options_are_starred(text, shown):
    assert redact(text) == shown == redact(shown)


def test_values_are_gone_through_and_keep_their_kinds():
    value = {"a": ["s3://k:s@b", ("s3://k:s@b", 3)], "b": {"c": None, "d": 1.5}}
    assert redact(value) == {"a": ["s3://***@b", ("s3://***@b", 3)], "b": {"c": None, "d": 1.5}}
    assert redact(MappingProxyType({"s3://k:s@b": "s3://k:s@b"})) == {"s3://k:s@b": "s3://***@b"}
