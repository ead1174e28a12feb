"""What a notebook says and does once, at its beginning, on a machine of Colab."""

import importlib.metadata
import os
import pathlib

from packaging.requirements import Requirement

DRIVE = "/content/drive"


def begin(output_dir: str | None = None) -> None:
    """Mounts the user's drive where runs go there, and says what is lost with the machine, and what was never tested.

    Args:
      output_dir: where runs go, empty for the default; None in a notebook without runs.
    """
    for said in untested():
        print(said)
    if output_dir and pathlib.PurePosixPath(os.path.abspath(output_dir)).is_relative_to(DRIVE):
        from google.colab import drive

        drive.mount(DRIVE)
    elif output_dir is not None:
        print(
            f'runs are lost with this machine; output_dir = "{DRIVE}/MyDrive/dpnb" keeps them, and goes on there'
        )


def untested() -> list[str]:
    """Returns a sentence for each installed package whose version is outside what dpnb is tested with."""
    said = []
    for requirement in map(Requirement, importlib.metadata.requires("dpnb") or ()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            said.append(
                f"{requirement.name} {version} is here, and dpnb is tested with {requirement.specifier}"
            )
    return said
