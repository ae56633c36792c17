"""The chart: what Helm makes of it, what its values refuse, and that what is generated is up to date."""

from __future__ import annotations

import difflib
import re
from typing import Any

import pytest
import yaml

from outlast_operator import crd
from support.charts import CHART, GOLDEN, ROOT, VALUE_SETS, helm, render, run_helm, split, without_crd

needs_helm = pytest.mark.skipif(helm() is None, reason="helm is needed: it is neither on PATH nor in a lab's assets")


@needs_helm
def test_lint() -> None:
    done = run_helm("lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout + done.stderr


@needs_helm
@pytest.mark.parametrize("name", VALUE_SETS)
def test_golden(name: str) -> None:
    golden = (GOLDEN / f"{name}.yaml").read_text()
    rendered = without_crd(render(VALUE_SETS[name]))
    difference = "".join(difflib.unified_diff(golden.splitlines(True), rendered.splitlines(True), "golden", "now"))
    assert rendered == golden, f"if it is meant: make golden\n{difference}"


@needs_helm
@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"colour": "blue"}, "colour"),
        ({"image": {"version": "dev"}}, "version"),
        ({"image": {"pullPolicy": "Sometimes"}}, "pullPolicy"),
        ({"image": {"tag": "a b"}}, "tag"),
        ({"trainingImage": "two words"}, "trainingImage"),
        ({"namespaces": "default"}, "namespaces"),
        ({"namespaces": ["Not_A_Name"]}, "namespaces"),
        ({"replicas": "2"}, "replicas"),
        ({"replicas": -1}, "replicas"),
        ({"resources": {"limit": {}}}, "limit"),
        ({"nameOverride": "My App"}, "nameOverride"),
        ({"fullnameOverride": "Outlast"}, "fullnameOverride"),
        ({"podLabels": {"app.kubernetes.io/name": "mine"}}, "app.kubernetes.io/name"),
        ({"image": {"digest": "sha256:12"}}, "digest"),
        ({"logLevel": "verbose"}, "logLevel"),
        ({"extraArgs": ["workers=8"]}, "extraArgs"),
        ({"podLabels": {"a": 1}}, "podLabels"),
        ({"serviceMonitor": {"enabled": "yes"}}, "serviceMonitor"),
        ({"serviceMonitor": {"interval": "often"}}, "interval"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_values_are_refused(values: dict[str, Any], named: str) -> None:
    done = run_helm("template", "outlast", str(CHART), values=values)
    assert done.returncode != 0
    assert named in done.stderr


@needs_helm
def test_an_account_that_is_not_made_must_be_named() -> None:
    done = run_helm("template", "outlast", str(CHART), values={"serviceAccount": {"create": False}})
    assert done.returncode != 0
    assert "serviceAccount.name: name an existing ServiceAccount" in done.stderr


def test_every_value_has_a_schema_and_a_comment() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = yaml.safe_load((CHART / "values.schema.json").read_text())
    assert set(schema["properties"]) - {"global"} == set(values)
    for name, part in schema["properties"].items():
        if part.get("additionalProperties") is False and name != "resources":
            assert set(part["properties"]) == set(values[name]), name


def test_the_crd_is_up_to_date() -> None:
    made = crd.to_yaml()
    for path in (ROOT / "manifests" / "crd.yaml", CHART / "files" / "crd.yaml"):
        assert path.read_text() == made, f"{path.relative_to(ROOT)} is not what outlast.api says: make manifests"


@needs_helm
@pytest.mark.parametrize("keep", [True, False])
def test_the_crd_comes_as_a_template(keep: bool) -> None:
    """Helm upgrades it, and leaves it on uninstall if told so."""
    (rendered,) = (
        part for part in split(render({"crd": {"keep": keep}})) if part["kind"] == "CustomResourceDefinition"
    )
    annotations = rendered["metadata"].pop("annotations", {})
    assert annotations == ({"helm.sh/resource-policy": "keep"} if keep else {})
    assert rendered == yaml.safe_load(crd.to_yaml())


def objects(values: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [part for part in split(render(values)) if part["kind"] == kind]


@needs_helm
def test_dev_images() -> None:
    """``--set image.tag=dev`` alone runs what ``make images`` builds."""
    (deployment,) = objects({"image": {"tag": "dev"}}, "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "outlast-operator:dev"
    assert "--training-image=outlast-training:dev" in container["args"]


@needs_helm
def test_an_image_by_its_digest() -> None:
    digest = f"sha256:{'0f' * 32}"
    (deployment,) = objects({"image": {"digest": digest}, "trainingImage": "t:1"}, "Deployment")
    assert deployment["spec"]["template"]["spec"]["containers"][0]["image"] == f"outlast-operator@{digest}"


@needs_helm
def test_an_older_kubernetes_is_refused() -> None:
    done = run_helm("template", "outlast", str(CHART), "--kube-version", "1.28.9", values={})
    assert done.returncode != 0
    assert "kubeVersion: >=1.29.0-0" in done.stderr


@needs_helm
@pytest.mark.parametrize("release", ["r" * 53, "team.a", "2024", "2024.outlast"])
def test_any_release_name_gives_names_that_are_taken(release: str) -> None:
    values = {"serviceMonitor": {"enabled": True}, "networkPolicy": {"enabled": True}}
    done = run_helm("template", release, str(CHART), values=values)
    assert done.returncode == 0, done.stderr
    made = split(done.stdout)
    (service,) = [part for part in made if part["kind"] == "Service"]
    assert re.fullmatch("[a-z]([-a-z0-9]{0,61}[a-z0-9])?", service["metadata"]["name"])
    instances = {
        part["metadata"]["labels"]["app.kubernetes.io/instance"] for part in made if part["kind"] == "Deployment"
    }
    assert instances == {release}


@needs_helm
def test_the_operators_pods_are_selected_by_what_the_flag_says() -> None:
    """Jobs' NetworkPolicies are made from it."""
    (deployment,) = objects({"podLabels": {"team": "ml"}}, "Deployment")
    pod = deployment["spec"]["template"]
    (flag,) = [text for text in pod["spec"]["containers"][0]["args"] if text.startswith("--operator-labels=")]
    labels = dict(pair.split("=") for pair in flag.removeprefix("--operator-labels=").split(","))
    assert labels == deployment["spec"]["selector"]["matchLabels"]
    assert labels.items() <= pod["metadata"]["labels"].items()


@needs_helm
def test_with_namespaces_nothing_but_nodes_is_readable_elsewhere() -> None:
    values = {"namespaces": ["vision", "speech"]}
    roles = {role["metadata"]["name"]: role for role in objects(values, "ClusterRole")}
    everywhere = [binding["roleRef"]["name"] for binding in objects(values, "ClusterRoleBinding")]
    assert [rule["resources"] for name in everywhere for rule in roles[name]["rules"]] == [["nodes"]]
    bound = {
        b["metadata"]["namespace"] for b in objects(values, "RoleBinding") if b["roleRef"]["kind"] == "ClusterRole"
    }
    assert bound == {"vision", "speech"}


@needs_helm
@pytest.mark.parametrize(
    ("resource", "verbs"),
    [
        ("pods", {"get", "list", "watch", "delete"}),
        ("pods/portforward", {"get", "create"}),
        ("pods/log", {"get"}),
        ("configmaps", {"get", "create", "update", "patch", "delete"}),
        ("secrets", {"get"}),
    ],
)
def test_people_who_edit_have_what_trainctl_needs(resource: str, verbs: set[str]) -> None:
    """A port-forward over a WebSocket is a GET; faults delete Pods, and ``submit`` what it left over."""
    (role,) = (role for role in objects({}, "ClusterRole") if role["metadata"]["name"] == "outlast-edit")
    granted = {verb for rule in role["rules"] if resource in rule["resources"] for verb in rule["verbs"]}
    assert granted == verbs


@needs_helm
@pytest.mark.parametrize("name", VALUE_SETS)
def test_no_wildcards_and_no_rights_to_rise(name: str) -> None:
    for role in objects(dict(VALUE_SETS[name]), "ClusterRole") + objects(dict(VALUE_SETS[name]), "Role"):
        for rule in role["rules"]:
            assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"]
            assert not {"escalate", "bind", "impersonate"} & set(rule["verbs"])
