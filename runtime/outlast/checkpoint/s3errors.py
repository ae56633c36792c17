"""What boto3, its libraries and S3 services raise and answer, in the words of a store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from botocore import exceptions as b
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from outlast.errors import (
    CheckpointError,
    ObjectMissing,
    OutlastError,
    PreconditionFailed,
    StoreDenied,
    StoreUnavailable,
)

_LATER = {429, 500, 502, 503, 504, 408, 409}
_THROTTLED = {
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "RequestLimitExceeded",
    "RequestTimeout",
    "InternalError",
}
_DAMAGED = {
    "BadDigest",
    "IncompleteBody",
    "InvalidDigest",
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
}
"""What was sent did not arrive as it was sent."""
_MISSING = {"NoSuchKey", "NoSuchVersion", "NoSuchUpload"}
_LOST = (
    b.ConnectionError,
    b.HTTPClientError,
    b.IncompleteReadError,
    b.ResponseStreamingError,
    b.ReadTimeoutError,
    b.ChecksumError,
    b.FlexibleChecksumError,
    ResponseParserError,
    HTTPError,
    OSError,
)
"""The request or its answer did not come through."""
_UNIDENTIFIED = (b.CredentialRetrievalError, b.MetadataRetrievalError)
"""Whoever gives out credentials failed: the machine's metadata service, a Pod's identity agent, a program. Also a wrong
configuration ends so, but mostly they are asked again with success, and every hour of a run they are: to deny would end
a job for their hiccup, to wait costs a wrong configuration no more than patience."""
_UNREADABLE = ("No such file", "Is a directory", "Permission denied", "no certificate", "PEM lib")
"""In the text of an SSLError: this machine's file of authorities is none, which no asking again changes."""
_UNTRUSTED = ("certificate verify failed", "doesn't match")
"""In the text of an SSLError: of a certificate that is renewed late, or that an ingress has while it is rescheduled, as
of a wrong configuration. The first pass, so all are waited for, as in ``_UNIDENTIFIED``."""
_NOBODY = (b.NoCredentialsError, b.PartialCredentialsError, b.TokenRetrievalError)


_UNKNOWN = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId", "InvalidClientTokenId"}
"""Codes of credentials that are none any more; mostly with status 400."""


@dataclass(frozen=True)
class Where:
    """What is asked: ``url`` with the key, a service's bucket and endpoint; ``conditional``: a put on a condition."""

    url: str
    bucket: str
    endpoint: str
    conditional: bool = False


@contextmanager
def told(where: Where) -> Iterator[None]:
    """Raises StoreError and CheckpointError in place of what boto3 raises in this block."""
    url = where.url
    try:
        yield
    except b.ClientError as error:
        raise _answer(where, error) from error
    except _NOBODY as error:
        raise StoreDenied(f"{url}: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role") from error
    except _UNIDENTIFIED as error:
        raise StoreUnavailable(f"{url}: {error}; if this lasts, check what gives out the credentials") from error
    except b.SSLError as error:
        raise _unsafe(where, error) from error
    except _LOST as error:
        raise StoreUnavailable(f"{url}: {error}") from error
    except (b.BotoCoreError, ValueError) as error:
        remedy = "check the S3 configuration (AWS_ENDPOINT_URL, AWS_DEFAULT_REGION, AWS_PROFILE, ~/.aws)"
        raise StoreDenied(f"{url}: {error}; {remedy}") from error
    except KeyError as error:
        text = f"{url}: the answer has no {error}: is {where.endpoint} an S3 service? Check AWS_ENDPOINT_URL"
        raise StoreDenied(text) from error


def _unsafe(where: Where, error: b.SSLError) -> OutlastError:
    text = f"{where.url}: {error}"
    if any(words in str(error) for words in _UNREADABLE):
        return StoreDenied(f"{text}; set AWS_CA_BUNDLE to a file with certificates that can be read")
    if any(words in str(error) for words in _UNTRUSTED):
        remedy = f"set AWS_CA_BUNDLE to a file with the authority that {where.endpoint} is signed by"
        return StoreUnavailable(f"{text}; if this lasts, {remedy}, or correct AWS_ENDPOINT_URL")
    return StoreUnavailable(text)


def _answer(where: Where, error: b.ClientError) -> OutlastError:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    text = f"{where.url}: {code} ({status}): {error.response.get('Error', {}).get('Message', '')}"
    if code == "NoSuchBucket":
        return StoreDenied(f"{text}; make the bucket {where.bucket}, or correct spec.checkpoint.url")
    if code in _MISSING or (status == 404 and error.operation_name == "HeadObject"):
        return ObjectMissing(text)
    if status == 404:  # of an ingress without a service behind it: no S3 service answers so
        return StoreUnavailable(f"{text}; if this lasts, check AWS_ENDPOINT_URL: is {where.endpoint} an S3 service?")
    if status == 412 or code == "PreconditionFailed":
        return PreconditionFailed(text)
    if status == 416:
        return CheckpointError(f"{where.url}: the object ends before what was to be read of it")
    if status == 501 or code == "NotImplemented":
        lacks = "conditional writes (If-Match, If-None-Match)" if where.conditional else error.operation_name
        return StoreDenied(f"{text}; {where.endpoint} has no {lacks}: use an S3 service that has, or file:///folder")
    if status in _LATER or status >= 500 or code in _THROTTLED or code in _DAMAGED:
        return StoreUnavailable(text)
    if status in (401, 403) or code in _UNKNOWN or code.startswith("Auth"):
        what = f"bucket {where.bucket} at {where.endpoint}"
        return StoreDenied(f"{text}; check the credentials and what they may do with {what}")
    remedy = "check spec.checkpoint.url, the region (AWS_REGION) and that it is an S3 service"
    return StoreDenied(f"{text}; {where.endpoint} does not take {error.operation_name} as it was asked: {remedy}")


def is_unable(error: b.ClientError) -> bool:
    """Whether the service does not know the operation, or not in this form; not who asks."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return status in (400, 405, 501) and code not in _UNKNOWN | _DAMAGED | _THROTTLED | {"NoSuchBucket"}
