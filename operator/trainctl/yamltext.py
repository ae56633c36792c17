"""YAML that Kubernetes reads as it is meant.

PyYAML leaves the quotes off what it would take for text itself. Kubernetes takes some of that, such as ``1e-3``,
``0o17`` and ``y``, for numbers and booleans.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

_NUMBER = re.compile(
    r"""[-+]?_*(?:
        0_*[xX][0-9a-fA-F_]+
        | 0_*[oO][0-7_]+
        | 0_*[bB][-+]?[01_]+
        | (?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9_]+)(?:[eE][-+]?[0-9_]+)?
    )$""",
    re.VERBOSE,
)
"""Go's numbers, and underscores wherever they stand."""
_BOOLEAN = re.compile(r"[yYnN]$")


class _Dumper(yaml.SafeDumper):
    """Quotes all text that is a number or a boolean in YAML 1.1 or 1.2."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOLEAN, list("yYnN"))


def as_yaml(value: Mapping[str, Any]) -> str:
    """One document, in the order that it has."""
    return yaml.dump(dict(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
