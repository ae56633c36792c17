"""Finding the cluster as kubectl does: --kubeconfig, KUBECONFIG (files that are merged), ~/.kube/config, and in a Pod
without any of these its own service account."""

from __future__ import annotations

import binascii
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from kubernetes.client import Configuration
from kubernetes.config.config_exception import ConfigException
from kubernetes.config.incluster_config import load_incluster_config
from kubernetes.config.kube_config import KubeConfigLoader, KubeConfigMerger

from outlast.errors import RequestError
from trainctl.cluster.where import Where, check_namespace

IN_CLUSTER = "in-cluster"
"""What the context is called where a Pod's own account is used."""
_POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_SHOWN = 12


@dataclass(frozen=True)
class Found:
    """A cluster, as far as files tell. ``impersonated``: headers that say as whom to ask, which the client library does
    not know of."""

    configuration: Configuration
    context: str
    namespace: str
    impersonated: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        check_namespace(self.namespace)


def find_cluster(where: Where, *, credentials: bool = True) -> Found:
    """The cluster, the context's name and the namespace in force. Asks nothing of the cluster; a context's exec plugin
    is run. Without ``credentials`` it is not, and the cluster cannot be asked.

    Raises RequestError that names the file and what to do.
    """
    files = _files(where)
    if not files:
        return _in_cluster(where)
    text = os.pathsep.join(map(str, files))
    try:
        loaded, current = _merged(files)
        if loaded is None:
            raise _wrong(text, "it is empty")
        return _of_context(loaded, current, where, text, credentials)
    except (ConfigException, binascii.Error, KeyError, TypeError, AttributeError, ValueError) as error:
        raise _wrong(text, " ".join(str(error).split())) from error
    except OSError as error:
        raise RequestError(f"{error.filename or text}: {error.strerror}; the kubeconfig cannot be read") from error


def _wrong(text: object, reason: str) -> RequestError:
    return RequestError(
        f"{text}: this is no usable kubeconfig: {reason}: mend it, or say where yours lies (--kubeconfig)"
    )


def _files(where: Where) -> list[Path]:
    """The kubeconfig files there are; none: a Pod's own account is meant."""
    if where.kubeconfig is not None:
        if not where.kubeconfig.exists():
            raise RequestError(f"--kubeconfig {where.kubeconfig}: there is no such file")
        return [where.kubeconfig]
    named = [_expanded(part) for part in os.environ.get("KUBECONFIG", "").split(os.pathsep) if part]
    files = [path for path in named or [_expanded("~/.kube/config")] if path.exists()]
    if not files and "KUBERNETES_SERVICE_HOST" not in os.environ:
        where_to = f"KUBECONFIG names {', '.join(map(str, named))}" if named else "there is none at ~/.kube/config"
        raise RequestError(
            f"no kubeconfig was found: {where_to}: get one from who runs the cluster and say where it lies "
            "(--kubeconfig, or KUBECONFIG)"
        )
    return files


def _expanded(path: str) -> Path:
    """With the home in place of ~; as it is where there is none, as of a user whom nobody knows."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 (Path.expanduser raises there)


def _merged(files: list[Path]) -> tuple[Any, Any]:
    """The files as one, and the current context that the first to name one names; files that are empty do not count."""
    filled = [str(path) for path in files if _is_filled(path)]
    merger = KubeConfigMerger(os.pathsep.join(filled))
    named = (config.get("current-context") for config in merger.config_files.values())
    return merger.config, next(filter(None, named), None)


def _is_filled(path: Path) -> bool:
    """Whether there is anything in it. Raises RequestError when that is no kubeconfig."""
    try:
        found = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise _wrong(path, f"it is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict | None):
        raise _wrong(path, "it holds no mapping (apiVersion, clusters, contexts, users)")
    return found is not None


def _of_context(loaded: Any, current: Any, where: Where, text: str, credentials: bool) -> Found:
    names = [str(context["name"]) for context in loaded["contexts"].value or []] if "contexts" in loaded else []
    chosen = where.context or current
    if not chosen:
        raise RequestError(f"{text}: no context is current: choose one with --context ({_listed(names)})")
    if chosen not in names:
        said = "--context" if where.context else "current-context"
        raise RequestError(f"{said} {chosen}: there is no such context in {text}: there are {_listed(names)}")
    loader = KubeConfigLoader(config_dict=loaded, active_context=chosen, config_base_path=None)
    configuration = Configuration()
    if credentials:
        _configure(configuration, loader, chosen, text)
    context = loader.current_context.get("context") or {}
    namespace = where.namespace or context.get("namespace") or "default"
    return Found(configuration, chosen, namespace, tuple(_impersonated(loaded, context.get("user"))))


def _impersonated(loaded: Any, user: object) -> Iterator[tuple[str, str]]:
    """The user's as, as-uid, as-groups and as-user-extra as headers.

    Source: Kubernetes, user impersonation; client-go, transport.NewImpersonatingRoundTripper.
    """
    users = loaded["users"].value if "users" in loaded else []
    own = next((one.value.get("user") or {} for one in users or [] if one["name"] == user), {})
    single = {"Impersonate-User": own.get("as"), "Impersonate-Uid": own.get("as-uid")}
    found = [(header, value) for header, value in single.items() if value]
    found += [("Impersonate-Group", group) for group in own.get("as-groups") or ()]
    for key, values in (own.get("as-user-extra") or {}).items():
        found += [(f"Impersonate-Extra-{quote(str(key).lower(), safe='')}", value) for value in values or ()]
    if found and not own.get("as"):
        raise ValueError(f'user "{user}" impersonates without "as"')
    return ((header, str(value)) for header, value in found)


def _configure(configuration: Configuration, loader: KubeConfigLoader, context: str, text: str) -> None:
    with _complaints() as said:
        loader.load_and_set(configuration)
    if said:
        raise RequestError(
            f'{text}: the credentials of context "{context}" cannot be had from its exec plugin: {said[0]}: mend or '
            "install it, or choose another context with --context"
        )
    if not str(configuration.host).lower().startswith(("https://", "http://")):
        raise _wrong(text, f'"{configuration.host}" is no server of a cluster, as https://HOST:PORT is one')


@contextmanager
def _complaints() -> Iterator[list[str]]:
    """What the client library says of an exec plugin: it logs that it failed, and goes on without credentials."""
    keeper = _Keeper(logging.ERROR)
    root = logging.getLogger()
    root.addHandler(keeper)
    try:
        yield keeper.said
    finally:
        root.removeHandler(keeper)


class _Keeper(logging.Handler):
    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == "root":
            self.said.append(_reason(sys.exception(), record.getMessage()))


def _reason(error: BaseException | None, message: str) -> str:
    """Of an OSError without its number; on a terminal the library falls over a plugin's failure (AttributeError),
    which the plugin has told itself."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    return "it failed" if isinstance(error, AttributeError) else " ".join(message.split())


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "none") + more


def _in_cluster(where: Where) -> Found:
    if where.context:
        raise RequestError(
            f"--context {where.context}: there is no kubeconfig that could hold it: give one (--kubeconfig)"
        )
    configuration = Configuration()
    try:
        load_incluster_config(client_configuration=configuration)
        own = _POD_NAMESPACE.read_text().strip()
    except ConfigException as error:
        raise RequestError(f"this Pod has no service account to ask the API server with ({error})") from error
    except OSError:
        own = "default"
    return Found(configuration, IN_CLUSTER, where.namespace or own)
