"""The data of a notebook: downloaded once where they are missing, and done without where that cannot be."""

from dpnb import data
from dpnb.data import Dataset
from dpnb.experiments import Experiment

IMAGES = {"cifar10": 50_000, "cifar100": 50_000}  # to train on, of those that are downloaded
# At these presets a notebook may go on with other data: no number of the paper is at stake.
TRIED = ("smoke", "teach")


def fetch(
    name: str, *, data_dir="", file="", validation: int = 0, note: str = "", instead: str = ""
) -> Dataset | None:
    """Loads a data set, after downloading CIFAR if it is missing, and says what it does.

    Args:
      name, data_dir, file, validation, note: as for `dpnb.data.load`; empty text is None.
      instead: what the notebook does without the data, for the sentence that is printed; empty if nothing else will do.
    Returns:
      The data set; None if it is not on this machine and cannot be downloaded either.
    Raises:
      DataError: it is not to be had and nothing else will do, it is damaged, or there is no such array file.
    """
    given = dict(data_dir=data_dir or None, file=file or None, validation=validation, note=note)
    if name == "textures" and not file:
        print("drawing 63,000 images from random processes: a minute or two on a CPU", flush=True)
    try:
        try:
            loaded = data.load(name, **given)
            if file and (expected := IMAGES.get(name, len(loaded.train))) != len(loaded.train) + validation:
                print(f"{file}: {len(loaded.train):,} training images, and not the {expected:,} of {name}")
            return loaded
        except data.NotPrepared:
            if name not in IMAGES:
                raise
            data.prepare(name, data_dir or None)
            return data.load(name, **given)
    except (data.NotPrepared, data.Unreachable) as error:
        if not instead:
            raise
        print(f"{error}\n\n{name} is not on this machine: {instead}")
        return None


def or_embedded(
    e: Experiment, output_dir="", *, embedded: str = "digits", **given
) -> tuple[Experiment, Dataset]:
    """Loads the data of an experiment as `fetch` does, or else has it run on data that need no download.

    Args:
      e: the experiment.
      output_dir: where it was asked to run; a run that was given its place is of the data that it names, or fails.
      embedded: the data to go on with.
      given: for `fetch`.
    Returns:
      The experiment, on the embedded data if its own are not to be had, and the data.
    Raises:
      DataError: they are not to be had, and others will not do.
    """
    replaceable = not output_dir and e.preset in TRIED and not e.validation
    instead = f"this notebook goes on with {embedded}, which come with dpnb" * replaceable
    loaded = fetch(e.dataset, validation=e.validation, instead=instead, **given)
    if loaded is None:
        e = e.on(embedded).replace(data_note="")
        loaded = fetch(embedded, validation=e.validation)
    return e, loaded
