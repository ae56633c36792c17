"""One lab with three machines, a bucket, both images and a release of the chart, for all end-to-end tests; all of it is
taken down at the end. Tests that remove the release come last."""

from __future__ import annotations

import json
import pathlib
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import boto3
import pytest
from botocore.config import Config

from support.labs import Lab, build_images, lab_wide_s3, running_lab, save_logs
from support.policies import Enforcer, enforced
from support.stores import ROOT, environment
from support.trainingjobs import Job, local_digest, submitting

LAB = "e2e"
NAMESPACE = "train"
BUCKET = "training"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--timings", default=None, help="write what was measured to this JSON file")
    parser.addoption("--lab-logs", default=None, help="save what the cluster said to this folder before it goes")
    parser.addoption(
        "--keep-lab", action="store_true", help="use the lab that is up, and leave it up: for work on tests"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "last: removes what other tests need")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)
    for item in items:
        if pathlib.Path(__file__).parent in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(600, func_only=True))


@pytest.fixture(scope="session")
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with running_lab(LAB, nodes=3, keep=request.config.getoption("--keep-lab", default=False)) as found:
        build_images(found)
        yield found
        if folder := request.config.getoption("--lab-logs", default=None):
            save_logs(found, pathlib.Path(folder))


@pytest.fixture(scope="session")
def bucket(lab: Lab) -> Iterator[str]:
    """A store's URL; its credentials are the Secret "bucket" in the jobs' namespace, and in this process's environment."""
    with lab_wide_s3(lab) as variables, environment(variables):
        client = boto3.session.Session().client("s3", config=Config(s3={"addressing_style": "path"}))
        with suppress(client.exceptions.BucketAlreadyOwnedByYou):
            client.create_bucket(Bucket=BUCKET)
        client.close()
        restricted = {"pod-security.kubernetes.io/enforce": "restricted"}
        lab.apply(
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": restricted}},
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": "bucket", "namespace": NAMESPACE},
                "stringData": variables,
            },
        )
        yield f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}"  # a lab that is kept has the checkpoints of earlier sessions


@pytest.fixture(scope="session")
def policies(lab: Lab) -> Iterator[Enforcer]:
    """NetworkPolicies hold in the lab, for all tests: who a job needs and its policy forgot would be missed."""
    with enforced(lab) as found:
        yield found


@pytest.fixture(scope="session")
def release(lab: Lab, bucket: str, policies: Enforcer) -> Lab:
    """The lab with Outlast in it, as the README says."""
    chart = str(ROOT / "charts" / "outlast")
    where = ["--namespace", "outlast-system", "--create-namespace"]
    values = [
        "--set",
        "image.tag=dev",
        "--set",
        "networkPolicy.enabled=true",
        "--set-string",
        f"podAnnotations.tested={time.time():.0f}",
    ]  # in a kept lab, new Pods
    lab.helm("upgrade", "--install", "outlast", chart, *where, *values, "--wait", "--timeout", "120s")
    return lab


@pytest.fixture(scope="session")
def timings(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """What was measured, by name."""
    found: dict[str, Any] = {}
    yield found
    if path := request.config.getoption("--timings", default=None):
        pathlib.Path(path).write_text(json.dumps(found, indent=1) + "\n")


@pytest.fixture(scope="session")
def undisturbed(lab: Lab, bucket: str) -> Callable[[int, int], str]:
    """The weights' digest of the same job run by ``trainctl run`` in one Pod, where nothing fails: (steps, ranks) -> it."""
    known: dict[tuple[int, int], str] = {}

    def digest(steps: int, ranks: int) -> str:
        if (steps, ranks) not in known:
            known[steps, ranks] = local_digest(lab, NAMESPACE, steps, ranks)
        return known[steps, ranks]

    return digest


@pytest.fixture
def submit(release: Lab) -> Iterator[Callable[[dict[str, Any]], Job]]:
    """Applies a job, and removes it afterwards: nothing of it may stay."""
    with submitting(release, NAMESPACE) as apply:
        yield apply
