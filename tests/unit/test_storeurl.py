"""Stores and checkpoints in them, as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast.storeurl import job_of, parse_checkpoint, parse_store_url


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://my.bucket-1/a/b", "s3://my.bucket-1/a/b"),
        ("s3://bucket/prefix//", "s3://bucket/prefix"),
        ("s3://bucket/user@host/x", "s3://bucket/user@host/x"),
        ("file:///folder", "file:///folder"),
        ("file:///a/b/", "file:///a/b"),
        ("file:///a%20b", "file:///a%20b"),
    ],
)
def test_a_store(text: str, url: str) -> None:
    assert parse_store_url(text) == url


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "write s3://bucket/prefix or file:///folder"),
        ("bucket/prefix", "is no store"),
        ("/mnt/checkpoints", "did you mean file:///mnt/checkpoints?"),
        ("file:/mnt/checkpoints", "did you mean file:///mnt/checkpoints?"),
        ("file://mnt/checkpoints", "did you mean file:///mnt/checkpoints?"),
        ("file://", "no absolute folder"),
        ("file:///", "no absolute folder"),
        ("gs://bucket/prefix", "is no store"),
        ("https://bucket.s3.amazonaws.com/x", "is no store"),
        ("S3://bucket", "is no store"),
        ("s3:/bucket", "is no store"),
        ("s3://", '"" is no bucket'),
        ("s3://Bucket/x", '"Bucket" is no bucket'),
        ("s3://ab", "3 to 63"),
        ("s3://bucket-/x", "is no bucket"),
        ("s3://bucket/a//b", "without //"),
        ("s3://bucket/../b", ". and .."),
        ("file:///a/./b", ". and .."),
        ("s3://bucket/x?versionId=1", "'?' may not"),
        ("s3://bucket/x#y", "'#' may not"),
        ("s3://bucket/a b", "' ' may not"),
        (" s3://bucket", "is no store"),
        ("s3://bucket\n", "may not"),
    ],
)
def test_no_store(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"write|may not|must be") as caught:
        parse_store_url(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "checkpoint", "job"),
    [
        ("s3://bucket/p/default/other@12000", "s3://bucket/p/default/other@12000", "s3://bucket/p/default/other"),
        ("s3://bucket/p/default/other", "s3://bucket/p/default/other", "s3://bucket/p/default/other"),
        ("s3://bucket/p/other/", "s3://bucket/p/other", "s3://bucket/p/other"),
        ("s3://bucket/p/other/@12", "s3://bucket/p/other@12", "s3://bucket/p/other"),
        ("file:///s/user@host/other@0", "file:///s/user@host/other@0", "file:///s/user@host/other"),
        ("file:///s/other@007", "file:///s/other@7", "file:///s/other"),
    ],
)
def test_a_checkpoint(text: str, checkpoint: str, job: str) -> None:
    assert parse_checkpoint(text) == checkpoint
    assert job_of(checkpoint) == job


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("s3://bucket/p/other@", '"@" is no step'),
        ("s3://bucket/p/other@latest", '"@latest" is no step: write @12000'),
        ("s3://bucket/p/other@-1", '"@-1" is no step'),
        ("s3://bucket/p/other@1@2", '"@1@2" is no step'),
        ("s3://bucket", "names a bucket, not a job"),
        ("s3://bucket@12", "names a bucket, not a job"),
        ("other@12", "is no store"),
        ("", "is no store"),
    ],
)
def test_no_checkpoint(text: str, words: str) -> None:
    with pytest.raises(ValueError, match="write") as caught:
        parse_checkpoint(text)
    assert words in str(caught.value)


@given(st.text(max_size=40) | st.text("s3file:/@.ab1", max_size=30).map("file:///".__add__))
def test_what_is_taken_stays_as_it_is(text: str) -> None:
    for parse in (parse_store_url, parse_checkpoint):
        try:
            once = parse(text)
        except ValueError as error:
            assert str(error)  # noqa: PT017 (either outcome is right)
        else:
            assert parse(once) == once
            assert parse is parse_store_url or not job_of(once).endswith("/")
