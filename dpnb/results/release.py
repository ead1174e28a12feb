"""What may be published of a run with a secret seed: nothing exact about the training data.

`release/` may be published, `private/` (see `dpnb.files.private_folder`) never. Both the record and the
notebook are made by naming what is kept, so a new item stays private until it is added here.
"""

import copy
import pathlib
from typing import Any

from dpnb.files import private_folder
from dpnb.privacy.randomness import random_bytes

TAG = "release"  # tags notebook cells whose printed text may be published
RECORD, FULL_RECORD = "result.json", "full-result.json"
# Items of a record that do not depend on the training data, or only through noisy parameters.
KEPT = (
    "experiment", "preset", "privacy", "augmult", "clip_norm", "seed", "accuracy", "loss", "evaluated_on", "pretrained",
    "paper", "devices", "computed_in", "evaluated_in", "machine", "versions", "git_revision", "stopped", "hyper_parameters", "ledger",
)  # fmt: skip
POINT = ("step", "epsilon", "raw_accuracy", "ema_accuracy")  # what is kept of a point of the curve
LEFT_OUT = "(left out: shows training data, statistics of them without noise, or a figure)\n"


def keyed(fingerprint: str, seed: int) -> str:
    """Returns a hash of the data that only those who know the run's seed can recompute.

    Without a key it would tell anyone which of two candidate data sets was trained on.

    >>> keyed("a0", 7)[:14], keyed("a0", 7) == keyed("a0", 8)
    ('keyed 5282423c', False)
    """
    return f"keyed {random_bytes(32, seed, 'data fingerprint', fingerprint).hex()}"


def folder(directory: str | pathlib.Path, secret: bool, private: bool = True) -> pathlib.Path:
    """Returns the folder for record, statement and weights of a run, which is made if missing.

    Args:
      directory: of the run.
      secret: whether its seed is secret; then it is `release/`, otherwise (the data are public) `directory`.
      private: whether the run has a privacy claim; without one nothing of a secret run is released, and
        it is `private/`.
    """
    if not (secret and private):
        return private_folder(directory, secret)
    made = pathlib.Path(directory) / "release"
    made.mkdir(parents=True, exist_ok=True)
    return made


def record(full: dict[str, Any], seed: int) -> dict[str, Any]:
    """Returns the part of a run's record that may be published, with the keys that readers of records expect.

    Args:
      full: the record; its data fingerprint becomes a keyed one, and its curve keeps only `POINT`.
      seed: the run's secret.
    Returns:
      Like `dpnb.results.record`, but seconds and peak memory, which reveal batch sizes, are None, and
      `finished` is only a day.
    """
    kept = {name: full[name] for name in KEPT}
    data = {**full["data"], "fingerprint": keyed(full["data"]["fingerprint"], seed)}
    curve = [{name: point[name] for name in POINT if name in point} for point in full["curve"]]
    choices = [{k: v for k, v in choice.items() if k != "timings"} for choice in full["choices"]]
    day = full["finished"][:10] + "T00:00:00+00:00"
    return {
        **kept,
        "choices": choices,
        "data": data,
        "curve": curve,
        "finished": day,
        "seconds": None,
        "peak_memory_mib": None,
    }


def notebook(executed: dict[str, Any]) -> dict[str, Any]:
    """Copies an executed notebook with the printed text of cells tagged `TAG`, and no other output.

    Figures are left out too, as they cannot be searched, and so are metadata, which tell how long cells took.

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
    """Returns what was printed or displayed as Markdown; None for an output of another kind."""
    if output.get("name") == "stdout":
        return _printed(output["text"])
    markdown = output.get("data", {}).get("text/markdown")
    if markdown is None:
        return None
    return {"output_type": "display_data", "data": {"text/markdown": markdown}, "metadata": {}}


def _printed(text: str | list[str]) -> dict[str, Any]:
    return {"output_type": "stream", "name": "stdout", "text": text}
