"""Puts the pinned versions into a wheel, but not into an editable installation, which finds them in the checkout."""

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class PinnedVersions(BuildHookInterface):
    """`constraints.txt` as `dpnb/share/constraints.txt`; `pyproject.toml` can map folders there, but no file."""

    def initialize(self, version: str, build_data: dict) -> None:
        """Called before a wheel is built; `version` is "standard" or "editable"."""
        if version == "standard":
            build_data["force_include"]["constraints.txt"] = "dpnb/share/constraints.txt"
