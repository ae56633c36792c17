"""What S3 services answer, in the words of a store: what is tried again, what is an answer, what a person must mend."""

from __future__ import annotations

from typing import Any, cast

import pytest
from botocore import exceptions as b
from botocore.parsers import RestXMLParser
from botocore.session import get_session

from outlast.checkpoint.s3errors import Where, told
from outlast.errors import ObjectMissing, OutlastError, StoreDenied, StoreUnavailable

WHERE = Where("s3://bucket/x/key", "bucket", "https://minio:9000")


def said(error: Exception) -> OutlastError:
    with pytest.raises(OutlastError) as caught, told(WHERE):
        raise error
    return caught.value


def answer(code: str, status: int, operation: str) -> b.ClientError:
    return b.ClientError(
        {"Error": {"Code": code, "Message": "because"}, "ResponseMetadata": cast(Any, {"HTTPStatusCode": status})},
        operation,
    )


@pytest.mark.parametrize(
    "code", ["BadDigest", "IncompleteBody", "InvalidDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"]
)
@pytest.mark.parametrize("operation", ["PutObject", "UploadPart"])
def test_what_was_damaged_on_its_way_is_sent_again(code: str, operation: str) -> None:
    assert type(said(answer(code, 400, operation))) is StoreUnavailable


@pytest.mark.parametrize(
    ("code", "operation", "kind"),
    [
        ("NoSuchKey", "GetObject", ObjectMissing),
        ("NoSuchVersion", "GetObject", ObjectMissing),
        ("404", "GetObject", StoreUnavailable),
        ("", "GetObject", StoreUnavailable),
        ("NotFound", "GetObject", StoreUnavailable),
        ("NoSuchBucket", "GetObject", StoreDenied),
        ("404", "HeadObject", ObjectMissing),
        ("NoSuchKey", "PutObject", ObjectMissing),
        ("404", "PutObject", StoreUnavailable),
        ("NoSuchUpload", "UploadPart", ObjectMissing),
        ("NoSuchUpload", "CompleteMultipartUpload", ObjectMissing),
        ("404", "UploadPart", StoreUnavailable),
        ("404", "ListObjectsV2", StoreUnavailable),
        ("NoSuchBucket", "ListObjectsV2", StoreDenied),
    ],
)
def test_an_object_is_missing_only_when_a_service_says_so(code: str, operation: str, kind: type[OutlastError]) -> None:
    assert type(said(answer(code, 404, operation))) is kind


@pytest.mark.parametrize(
    ("code", "status", "remedy"),
    [
        ("AccessDenied", 403, "check the credentials"),
        ("ExpiredToken", 400, "check the credentials"),
        ("AuthorizationHeaderMalformed", 400, "check the credentials"),
        ("MissingContentMD5", 400, "does not take DeleteObjects as it was asked"),
    ],
)
def test_credentials_are_blamed_for_what_they_do(code: str, status: int, remedy: str) -> None:
    error = said(answer(code, status, "DeleteObjects"))
    assert type(error) is StoreDenied
    assert remedy in str(error)


def test_the_page_of_an_ingress_says_nothing_of_an_object() -> None:
    shape = get_session().get_service_model("s3").operation_model("GetObject").output_shape
    page = {"status_code": 404, "headers": {}, "body": b"404 page not found\n"}
    error = b.ClientError(RestXMLParser().parse(page, shape), "GetObject")
    assert type(said(error)) is StoreUnavailable
    assert "https://minio:9000 an S3 service" in str(said(error))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate", StoreUnavailable),
        ("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: certificate has expired", StoreUnavailable),
        ("hostname 'minio' doesn't match 'localhost'", StoreUnavailable),
        ("[Errno 2] No such file or directory", StoreDenied),
        ("[Errno 13] Permission denied", StoreDenied),
        ("[Errno 21] Is a directory", StoreDenied),
        ("[X509] PEM lib (_ssl.c:4154)", StoreDenied),
        ("[X509: NO_CERTIFICATE_OR_CRL_FOUND] no certificate or crl found", StoreDenied),
    ],
)
def test_certificates_that_cannot_be_read_or_trusted_are_told_with_the_remedy(
    text: str, kind: type[OutlastError]
) -> None:
    error = said(b.SSLError(endpoint_url="https://minio:9000", error=text))
    assert type(error) is kind
    assert "set AWS_CA_BUNDLE to a file with" in str(error)
    assert ("if this lasts" in str(error)) == (kind is StoreUnavailable)


@pytest.mark.parametrize(
    "text",
    [
        "[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol",
        "[SSL: DECRYPTION_FAILED_OR_BAD_RECORD_MAC] decryption failed or bad record mac",
    ],
)
def test_a_line_that_breaks_says_nothing_of_certificates(text: str) -> None:
    error = said(b.SSLError(endpoint_url="https://minio:9000", error=text))
    assert type(error) is StoreUnavailable
    assert "AWS_CA_BUNDLE" not in str(error)
