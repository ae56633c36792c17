"""The package itself: light to import, public names on demand."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import tomllib

import pytest

import outlast

PYPROJECT = pathlib.Path(__file__).parents[2] / "pyproject.toml"


def test_importing_outlast_imports_neither_torch_nor_ray() -> None:
    program = (
        "import sys, outlast, outlast.api; outlast.__version__; assert 'numpy' not in sys.modules; "
        "outlast.ElasticSampler(10, 4); assert not {'torch', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_public_names_are_there() -> None:
    for name in outlast.__all__:
        assert getattr(outlast, name) is getattr(outlast, name)
        assert name in dir(outlast)
    with pytest.raises(AttributeError, match="has no attribute 'missing'"):
        _ = outlast.missing


def test_the_version_is_the_distributions() -> None:
    assert outlast.__version__ == tomllib.loads(PYPROJECT.read_text())["project"]["version"]
