"""Pod security where a template is silent: what the Pod Security Standard "restricted" asks for. Pure.

Source: Kubernetes, Pod Security Standards. A template whose Pod or training container says that it runs as root, or
privileged, is left alone: half of the rules would only break it.
"""

from __future__ import annotations

from typing import Any

USER = 1000
"""The user and group of containers whose template names none; the training image's."""


def restrict(spec: dict[str, Any], main: dict[str, Any]) -> None:
    """Fill the security contexts of the Pod ``spec`` and of its training container ``main``, in place."""
    pod, own = dict(spec.get("securityContext") or {}), dict(main.get("securityContext") or {})
    user = own.get("runAsUser", pod.get("runAsUser"))
    if user == 0 or own.get("privileged") or own.get("runAsNonRoot", pod.get("runAsNonRoot")) is False:
        return
    if user is None:
        pod |= {"runAsUser": USER, "runAsGroup": pod.get("runAsGroup", USER)}
    pod.setdefault("fsGroup", pod.get("runAsGroup", USER))
    pod.setdefault("runAsNonRoot", True)
    pod.setdefault("seccompProfile", {"type": "RuntimeDefault"})
    own.setdefault("allowPrivilegeEscalation", False)
    own.setdefault("capabilities", {"drop": ["ALL"]})
    spec["securityContext"], main["securityContext"] = pod, own
