"""A lab's network plugin knows no NetworkPolicy: here they are enforced, by nftables in each Pod's own network namespace.

As network plugins do it: a Pod that a policy selects is reached by those alone that a rule names, and by its own machine
(the kubelet's probes); what is connected stays so; a Pod is let in a moment after it has got its address. Rules are
written anew, in one transaction, whenever Pods, policies or namespaces change. Only what Outlast's policies say is
understood: ingress, selectors by matchLabels, TCP ports.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kubernetes import client, config
from kubernetes.informer import ADDED, DELETED, MODIFIED, SharedInformer

from support.labs import Lab

TABLE = "inet network_policies"
Object = Mapping[str, Any]


@dataclass(frozen=True)
class Rule:
    """Who may connect. ``sources``: addresses, None: anybody. ``ports``: None: all of them."""

    sources: frozenset[str] | None
    ports: tuple[int, ...] | None


def _selects(selector: Object | None, labels: Mapping[str, str]) -> bool:
    selector = selector or {}
    assert not set(selector) - {"matchLabels"}, f"not understood here: {selector}"
    return all(labels.get(key) == value for key, value in (selector.get("matchLabels") or {}).items())


def _labels(found: Object) -> Mapping[str, str]:
    return found["metadata"].get("labels") or {}


def ingress(pod: Object, policies: Sequence[Object], pods: Sequence[Object], namespaces: Sequence[Object]) -> list[Rule] | None:  # fmt: skip
    """What the policies that select ``pod`` let in together; None where none selects it, so that all is let in."""
    own = pod["metadata"]["namespace"]
    selecting = [
        policy["spec"]
        for policy in policies
        if policy["metadata"]["namespace"] == own
        and "Ingress" in policy["spec"].get("policyTypes", ["Ingress"])
        and _selects(policy["spec"].get("podSelector"), _labels(pod))
    ]
    if not selecting:
        return None
    rules = [rule for spec in selecting for rule in spec.get("ingress") or ()]
    return [Rule(_sources(rule.get("from"), own, pods, namespaces), _ports(rule.get("ports"), pod)) for rule in rules]


def _sources(peers: Sequence[Object] | None, own: str, pods: Sequence[Object], namespaces: Sequence[Object]) -> frozenset[str] | None:  # fmt: skip
    if not peers:
        return None
    found: set[str] = set()
    for peer in peers:
        assert not set(peer) - {"namespaceSelector", "podSelector"}, f"not understood here: {peer}"
        selector = peer.get("namespaceSelector")
        among = {own} if selector is None else {n["metadata"]["name"] for n in namespaces if _selects(selector, _labels(n))}  # fmt: skip
        found |= {
            pod["status"]["podIP"]
            for pod in pods
            if pod["metadata"]["namespace"] in among
            and _selects(peer.get("podSelector"), _labels(pod))
            and pod["status"].get("podIP")
            and pod["status"].get("phase") in ("Pending", "Running")
        }
    return frozenset(found)


def _ports(ports: Sequence[Object] | None, pod: Object) -> tuple[int, ...] | None:
    if not ports:
        return None
    named = {
        p["name"]: p["containerPort"] for c in pod["spec"]["containers"] for p in c.get("ports", ()) if "name" in p
    }
    assert all(port.get("protocol", "TCP") == "TCP" and "endPort" not in port for port in ports), ports
    return tuple(sorted(named.get(port["port"], port["port"]) for port in ports))


def ruleset(rules: Sequence[Rule] | None, always: Sequence[str]) -> str:
    """The transaction for ``nft -f``. Who was refused, and at which port, is kept in the set ``refused``."""
    lines = [
        f"add table {TABLE}",
        f"add set {TABLE} refused {{ type ipv4_addr . inet_service; flags dynamic; size 4096; }}",
        f"add chain {TABLE} input {{ type filter hook input priority 0; policy accept; }}",
        f"flush chain {TABLE} input",
    ]
    if rules is not None:
        chain = f"add rule {TABLE} input"
        lines += [f'{chain} iifname "lo" accept', f"{chain} ct state established,related accept"]
        lines += [f"{chain} ip saddr {{ {', '.join(always)} }} accept"]
        for rule in rules:
            if rule.sources is None or rule.sources:
                sources = "" if rule.sources is None else f"ip saddr {{ {', '.join(sorted(rule.sources))} }} "
                ports = "" if rule.ports is None else f"tcp dport {{ {', '.join(map(str, rule.ports))} }} "
                lines.append(f"{chain} {sources}{ports}accept")
        lines += [f"{chain} meta l4proto tcp update @refused {{ ip saddr . tcp dport }}", f"{chain} drop"]
    return "\n".join(lines) + "\n"


class Namespaces:
    """The network namespaces of Pods on this machine, by their address: each has one process "pause"."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, list[str]]] = {}  # /proc/PID/ns/net's inode -> (address, its gateways)

    def found(self) -> dict[str, tuple[int, list[str]]]:
        """Address -> (a process in it, its gateways, which are its machine's addresses)."""
        there: dict[str, tuple[int, list[str]]] = {}
        known: dict[str, tuple[str, list[str]]] = {}
        for folder in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                if (folder / "comm").read_text() != "pause\n":
                    continue
                identity = (folder / "ns" / "net").readlink().name
                known[identity] = self._known.get(identity) or self._look(int(folder.name))
            except (OSError, subprocess.CalledProcessError):
                continue  # it has just ended
            address, gateways = known[identity]
            there[address] = (int(folder.name), gateways)
        self._known = known
        return there

    def _look(self, pid: int) -> tuple[str, list[str]]:
        links = json.loads(within(pid, "ip", "-json", "-4", "address", "show", "dev", "eth0"))
        routes = json.loads(within(pid, "ip", "-json", "-4", "route", "show", "default"))
        return links[0]["addr_info"][0]["local"], [route["gateway"] for route in routes]


def within(pid: int, *command: str, given: str | None = None) -> str:
    """Run a command of this machine's in the network namespace of a process."""
    whole = ["nsenter", "--target", str(pid), "--net", *command]
    return subprocess.run(whole, input=given, capture_output=True, text=True, timeout=30, check=True).stdout


class Enforcer:
    """``always``: addresses that are let in everywhere, beside each Pod's own machine."""

    def __init__(self, lab: Lab, always: Sequence[str]) -> None:
        self._always = list(always)
        api = config.new_client_from_config(lab.variables["KUBECONFIG"])
        core, network = client.CoreV1Api(api), client.NetworkingV1Api(api)
        self._plain: Callable[[Any], Any] = api.sanitize_for_serialization
        self._pods = SharedInformer(core.list_pod_for_all_namespaces)
        self._policies = SharedInformer(network.list_network_policy_for_all_namespaces)
        self._namespaces = SharedInformer(core.list_namespace)
        self._informers = (self._pods, self._policies, self._namespaces)
        self._sites = Namespaces()
        self._changed, self._applied = threading.Event(), threading.Condition()
        self._enforced: dict[str, tuple[int, str]] = {}  # a Pod's address -> (a process in it, its rules)
        self._ended = False
        self._pool = ThreadPoolExecutor(1, "network-policies")

    def start(self) -> None:
        for informer in self._informers:
            for event in (ADDED, MODIFIED, DELETED):
                informer.add_event_handler(event, lambda _: self._changed.set())
            informer.start()
        self._running = self._pool.submit(self._run)

    def stop(self) -> None:
        self._ended = True
        self._changed.set()
        for informer in self._informers:
            informer.stop()
        self._running.result(60)
        self._pool.shutdown()

    def await_guarded(self, address: str, seconds: float = 20) -> int:
        """Returns, once rules hold in the Pod with ``address``, a process in its network namespace."""
        with self._applied:
            if self._applied.wait_for(lambda: address in self._enforced, seconds):
                return self._enforced[address][0]
        if self._running.done():
            self._running.result()
        raise AssertionError(f"no policy holds in the Pod {address} after {seconds:g} s")

    def refused(self, address: str) -> set[tuple[str, int]]:
        """(address, port) of everybody who was not let in to the Pod with ``address``."""
        pid = self._enforced[address][0]
        (found,) = [e["set"] for e in json.loads(within(pid, "nft", "-j", "list", "set", *TABLE.split(), "refused"))["nftables"] if "set" in e]  # fmt: skip
        return {(source, port) for source, port in (each["concat"] for each in found.get("elem", ()))}

    def _run(self) -> None:
        while not self._ended:
            self._changed.wait()
            self._changed.clear()
            self._apply()

    def _apply(self) -> None:
        pods, policies, spaces = ([self._plain(found) for found in i.cache.list()] for i in self._informers)
        sites = self._sites.found()
        for pod in pods:
            address = pod["status"].get("podIP")
            if address not in sites or pod["status"].get("phase") not in ("Pending", "Running"):
                continue
            pid, gateways = sites[address]
            text = ruleset(ingress(pod, policies, pods, spaces), [*gateways, *self._always])
            if self._enforced.get(address) == (pid, text) or ("drop" not in text and address not in self._enforced):
                continue
            try:
                within(pid, "nft", "-f", "-", given=text)
            except subprocess.CalledProcessError:
                if pathlib.Path(f"/proc/{pid}").exists():
                    raise
                continue
            with self._applied:
                self._enforced[address] = (pid, text)
                self._applied.notify_all()


@contextmanager
def enforced(lab: Lab) -> Iterator[Enforcer]:
    """The lab with its NetworkPolicies enforced; this machine itself, from which the tests ask, is always let in."""
    (status,) = json.loads(lab.kubelab("status", "--name", lab.name, "--json"))
    enforcer = Enforcer(lab, [status["host_address"]])
    enforcer.start()
    try:
        yield enforcer
    finally:
        enforcer.stop()
