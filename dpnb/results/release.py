"""What of a run with a secret seed may leave the building: nothing exact about the training data.

`release/` may be published, `private/` (see `dpnb.files.private_folder`) never. Both the record and the
notebook are made by naming what is kept, so that a new item stays private until somebody decides otherwise.
"""

import copy
import pathlib
from typing import Any

from dpnb.files import private_folder
from dpnb.privacy.randomness import random_bytes

TAG = "release"  # of notebook cells whose printed text may be published
RECORD, FULL_RECORD = "result.json", "full-result.json"
# Items of a record that are made without the training data, or from noisy parameters.
KEPT = (
    "experiment", "preset", "privacy", "augmult", "clip_norm", "seed", "accuracy", "loss", "evaluated_on", "pretrained",
    "paper", "devices", "machine", "versions", "git_revision", "stopped", "hyper_parameters", "ledger",
)  # fmt: skip
POINT = ("step", "epsilon", "raw_accuracy", "ema_accuracy")  # of a point of the curve
LEFT_OUT = "(left out: shows training data, statistics of them without noise, or a figure)\n"


def keyed(fingerprint: str, seed: int) -> str:
    """A hash of the data that only those who know the run's seed can recompute.

    An unkeyed one would tell everybody which of two candidate data sets was trained on.

    >>> keyed("a0", 7)[:14], keyed("a0", 7) == keyed("a0", 8)
    ('keyed 5282423c', False)
    """
    return f"keyed {random_bytes(32, seed, 'data fingerprint', fingerprint).hex()}"


def folder(directory: str | pathlib.Path, secret: bool, private: bool = True) -> pathlib.Path:
    """Where record, statement and weights of a run go; made if missing.

    Args:
      directory: of the run.
      secret: whether its seed is secret: `release/`. Otherwise the data are public: `directory` itself.
      private: whether the run has a privacy claim; without one, nothing of a secret run is released:
        `private/`.
    """
    if not (secret and private):
        return private_folder(directory, secret)
    made = pathlib.Path(directory) / "release"
    made.mkdir(parents=True, exist_ok=True)
    return made


def record(full: dict[str, Any], seed: int) -> dict[str, Any]:
    """The part of a run's record that may be published, with the keys that readers of records expect.

    Args:
      full: the record; its data fingerprint is keyed, its curve loses everything but `POINT`.
      seed: the run's secret.
    Returns:
      As `dpnb.results.record`; seconds and peak memory, which tell batch sizes, are None, and `finished` is
      a day.
    """
    kept = {name: full[name] for name in KEPT}
    data = {**full["data"], "fingerprint": keyed(full["data"]["fingerprint"], seed)}
    curve = [{name: point[name] for name in POINT if name in point} for point in full["curve"]]
    day = full["finished"][:10] + "T00:00:00+00:00"
    return {**kept, "data": data, "curve": curve, "finished": day, "seconds": None, "peak_memory_mib": None}


def notebook(executed: dict[str, Any]) -> dict[str, Any]:
    """A copy of an executed notebook with the printed text of cells tagged `TAG`, and no other output.

    Figures go too, as nobody can search them; so do metadata, which tell how long each cell took.

    Args:
      executed: the notebook, as `json.loads` reads it.
    """
    made = copy.deepcopy(executed)
    made["metadata"] = {k: v for k, v in made["metadata"].items() if k in ("kernelspec", "language_info")}
    for cell in made["cells"]:
        tags = cell["metadata"].get("tags", [])
        cell["metadata"] = {"tags": tags}
        if cell["cell_type"] == "code":
            kept = [text for output in cell["outputs"] * (TAG in tags) if (text := _text(output))]
            left_out = len(kept) < len(cell["outputs"])
            cell["outputs"] = kept + [_printed(LEFT_OUT)] * left_out
    return made


def _text(output: dict[str, Any]) -> dict[str, Any] | None:
    """What was printed or displayed as Markdown; None for an output of another kind."""
    if output.get("name") == "stdout":
        return _printed(output["text"])
    markdown = output.get("data", {}).get("text/markdown")
    if markdown is None:
        return None
    return {"output_type": "display_data", "data": {"text/markdown": markdown}, "metadata": {}}


def _printed(text: str | list[str]) -> dict[str, Any]:
    return {"output_type": "stream", "name": "stdout", "text": text}
