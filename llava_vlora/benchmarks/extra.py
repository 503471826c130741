"""Packages of the extra ``bench``, which few benchmarks need."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import ConfigError


def extra(module: str, use: str) -> Any:
    """A module of an optional package.

    Args:
        module: Its name.
        use: What needs it, for the message.

    Raises:
        ConfigError: The package is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        package = module.partition(".")[0]
        raise ConfigError(
            f"{use} needs {package}, which is not installed: pip install llava-vlora[bench]."
        ) from None
