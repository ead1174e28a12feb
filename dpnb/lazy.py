"""Names that a package exports without importing their modules before somebody asks (PEP 562)."""

import importlib
import sys
from collections.abc import Callable
from typing import Any


def attach(package: str, homes: dict[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose names live in the modules `homes`, {name: module}.

    >>> __getattr__, __dir__ = attach("dpnb.lazy", {"sqrt": "math"})
    >>> __getattr__("sqrt")(9.0)
    3.0
    """

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(homes[name]), name)
        setattr(sys.modules[package], name, value)  # the next time it is simply there
        return value

    return __getattr__, lambda: sorted({*vars(sys.modules[package]), *homes})
