"""Finds public weights by name or path, and converts published files to safetensors.

The data that a network saw before private training are public by assumption: no epsilon covers them.
"""

import dataclasses
import hashlib
import pathlib
import re
import urllib.request

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load as parse
from safetensors.numpy import save as serialised

from dpnb import folders
from dpnb.data import Dataset
from dpnb.files import write_atomic
from dpnb.models import nf_resnet, nfnet
from dpnb.models.weights import conversion, unpickle
from dpnb.models.weights.conversion import Arrays

CACHE = pathlib.Path("~/.cache/dpnb/weights")
OURS = folders.RECORDS / "pretrained"
AUTHORS = "https://storage.googleapis.com/dm_jax_privacy/models/"
TIMM = "https://huggingface.co/timm/"


@dataclasses.dataclass(frozen=True)
class Weights:
    """One published network.

    url: of the publisher's file (a directory for Orbax); "" for a file of ours, which comes with dpnb in
      results/pretrained.
    published_as: haiku (a pickle), orbax, timm (safetensors), or dpnb.
    network: "wrn-40-4", "nfnet-F0", "nf-resnet-50", "patch-linear".
    num_classes: of what it was trained on; 0 if it saw no label.
    saw: the public data it was trained on.
    inputs: how its pixels were scaled.
    sha256: hex, of the *converted* file; None if it has not been measured yet, and then the name alone is
      refused.
    """

    url: str
    published_as: str
    licence: str
    network: str
    num_classes: int
    saw: str
    inputs: str
    sha256: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(depth, width) of a Wide-ResNet."""
        return tuple(map(int, self.network.removeprefix("wrn-").split("-")))


_CC = "CC BY 4.0"
_CENTRED = "2 x - 1 of pixels in [0, 1]; dpnb standardises instead, which the first layers must get used to"
_IMAGENET = "mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225)"
_STANDARD = "standardised as in dpnb.data.augment"
_PIXELS = f"{_STANDARD}, and then back to 0 ... 255"
_PHOTOGRAPHS = (
    "ImageNet, the photographs of imagenet2012 (and so of imagenette, imagenet_resized, tiny_imagenet32)"
)
# Data sets whose photographs are ImageNet's, or may be: none of them is public if another one is private.
IMAGENETS = "imagenet|ilsvrc|imagewoof"
# Names that the registry of experiments uses although the weights were never released.
UNRELEASED = ("nf-resnet-200-jft", "nfnet-f3-jft")
WEIGHTS = {
    "wrn-10-2-tiny-imagenet32": Weights(
        "", "dpnb", "trained on ImageNet photographs: non-commercial research", "wrn-10-2", 200,
        "Tiny ImageNet, averaged to 32x32", _STANDARD,
        "c6bab11ca9e2a6ddce3a5ea846327c9527faa9d71e6c0698554e381b6629e8bb",
    ),
    "wrn-10-2-textures": Weights(
        "", "dpnb", "Apache-2.0", "wrn-10-2", 192, "random textures, no photograph at all", _STANDARD,
        "2aa676caf7e04859498f4006f07d8d60d72ed8f7d4b373938fbae5b37612b181",
    ),
    "patches-dead-leaves": Weights(
        "", "dpnb", "Apache-2.0", "patch-linear", 0, "random dead leaves, no photograph at all", _PIXELS, "e36611bb8396a564af6b39ee7c629a2159ce012ddd8e78a5eacaacb7593ca158",
    ),
    "patches-tiny-imagenet32": Weights(
        "", "dpnb", "learnt from ImageNet photographs: non-commercial research", "patch-linear", 0,
        "Tiny ImageNet, averaged to 32x32, without its labels", _PIXELS, "840247f1a01e8e7193adb099a5c86585a0e5fb1897366c9e43c5fcda67911370",
    ),
    "nf-resnet-14-textures": Weights(  # a quarter as wide
        "", "dpnb", "Apache-2.0", "nf-resnet-14", 192, "random textures, no photograph at all", _STANDARD,
        "763d2f5de1ce76f484abef154a42a0fcaf5d499563db9221f1ded6677bf9d7d2",
    ),
    "wrn-40-4-cifar100": Weights(
        AUTHORS + "WRN_40_4_CIFAR100.dill", "haiku", _CC, "wrn-40-4", 100, "CIFAR-100", _STANDARD
    ),
    "wrn-40-4-imagenet32": Weights(
        AUTHORS + "WRN_40_4_IMAGENET32.dill", "haiku", _CC, "wrn-40-4", 1000, _PHOTOGRAPHS + ", at 32x32", _CENTRED
    ),
    "wrn-28-10-imagenet32": Weights(
        AUTHORS + "WRN_28_10_IMAGENET32.dill", "haiku", _CC, "wrn-28-10", 1000, _PHOTOGRAPHS + ", at 32x32", _CENTRED
    ),
    **{
        f"nfnet-{size.lower()}-imagenet21k": Weights(
            f"gs://dm_jax_privacy/models/nfnet_{size.lower()}_im21k", "orbax", _CC, f"nfnet-{size}", 21_841,
            "ImageNet-21k, which contains " + _PHOTOGRAPHS, _IMAGENET,
        )
        for size in ("F0", "F1", "F3")
    },
    **{
        f"nfnet-{size.lower()}-imagenet": Weights(
            f"{TIMM}dm_nfnet_{size.lower()}.dm_in1k/resolve/main/model.safetensors", "timm", "Apache-2.0",
            f"nfnet-{size}", 1000, _PHOTOGRAPHS, _IMAGENET,
        )
        for size in ("F0", "F1", "F3")
    },
    "nf-resnet-50-imagenet": Weights(
        f"{TIMM}nf_resnet50.ra2_in1k/resolve/main/model.safetensors", "timm", "Apache-2.0", "nf-resnet-50",
        1000, _PHOTOGRAPHS, _IMAGENET,
    ),
}  # fmt: skip


def load(name_or_path: str, cache: str | pathlib.Path = CACHE) -> Arrays:
    """Loads the parameters of a public network, {"blocks/0/conv1/kernel": array, ...}, float32 or as packed.

    The cache is written atomically, and only after the hash was checked.

    Args:
      name_or_path: one of `WEIGHTS`, or a safetensors file of ours.
      cache: where converted files of named weights are kept.
    Raises:
      KeyError: it is neither a file nor a name.
      ValueError: a named file is not the one on record, or no hash is on record for it (nothing is
        trusted on first use); or a local file is damaged.
      OSError: the publisher cannot be reached, or there is no such file.
    """
    return _parse(_content(str(name_or_path), cache), name_or_path)


def _content(name: str, cache: str | pathlib.Path) -> bytes:
    if name not in WEIGHTS:  # a name never means a local file that happens to be called so
        return _local(name).read_bytes()
    weights = WEIGHTS[name]
    if not weights.url:
        file = OURS / f"{name}.safetensors"
        if not file.is_file():
            raise FileNotFoundError(f"{name} comes with dpnb, and there is no {file}; install it again")
        content = file.read_bytes()
        _check(name, content, weights.sha256, OURS)
        return content
    if weights.sha256 is None:
        raise ValueError(
            f"{name}: no SHA-256 is on record, and nothing is trusted on first use; download {weights.url} "
            f"yourself, `python -m dpnb.models.weights convert {name} FILE OUT.safetensors`, and pass OUT's path"
        )
    kept = pathlib.Path(cache).expanduser() / f"{name}.safetensors"
    if kept.is_file():
        content = kept.read_bytes()
        _check(name, content, weights.sha256, kept)
        return content
    try:
        with urllib.request.urlopen(weights.url, timeout=60) as answer:
            published = answer.read()
    except OSError as error:
        raise OSError(f"{name}: {weights.url} cannot be reached ({error}); pass a local path") from error
    content = converted(published, name)
    _check(name, content, weights.sha256, weights.url)
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(kept, content)
    return content


def _local(name: str) -> pathlib.Path:
    """Returns the file at a path of weights."""
    if name in UNRELEASED:
        raise ValueError(f"{name}: networks that saw JFT-300M were never released; `dpnb list` has stand-ins")
    path = pathlib.Path(name).expanduser()
    if path.is_file():
        return path
    if path.suffix == ".safetensors" or len(path.parts) > 1:
        parts = path.parts
        made = parts[parts.index("pretrain") + 1] if "pretrain" in parts[:-1] else ""
        how = f"`dpnb run pretrain/{made}` makes it" if made else "pre-train or convert one first"
        raise FileNotFoundError(f"there is no file of weights {path}; {how}")
    raise KeyError(f"weights are a safetensors file or one of {', '.join(WEIGHTS)}; got {name!r}")


def _parse(content: bytes, source) -> Arrays:
    try:
        return parse(content)
    except SafetensorError as error:
        raise _damaged(source, error) from error


def _damaged(source, error: SafetensorError) -> ValueError:
    return ValueError(f"{source} is no safetensors file, or damaged ({error})")


def converted(published: str | pathlib.Path | bytes, name: str) -> bytes:
    """Returns the content of a safetensors file made from a published one (see `convert`).

    Its metadata say which data the network saw.
    """
    return serialised(convert(published, WEIGHTS[name]), {"saw": WEIGHTS[name].saw})


def identity(weights: Arrays) -> str:
    """Returns the SHA-256 (hex) over names, shapes and float32 values, whatever file they came from."""
    digest = hashlib.sha256()
    for name, array in sorted(weights.items()):
        digest.update(f"{name} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array, "<f4"))
    return digest.hexdigest()


def saw(name_or_path: str | pathlib.Path) -> str:
    """Returns, in words, the public data that these weights were trained on, as far as the file itself says.

    Raises:
      KeyError, ValueError, OSError: as in `load`.
    """
    if str(name_or_path) in WEIGHTS:
        return WEIGHTS[str(name_or_path)].saw
    try:
        with safe_open(_local(str(name_or_path)), "numpy") as file:
            return (file.metadata() or {}).get("saw", "data that its file does not name")
    except SafetensorError as error:
        raise _damaged(name_or_path, error) from error


def provenance(name_or_path: str, private: Dataset | None = None) -> dict[str, str] | None:
    """Identifies public weights for the record of a run that starts from them; None for "", no weights.

    Args:
      private: the data to be trained on.
    Raises:
      ValueError: the weights say that they saw a data set of that name or fingerprint (or ImageNet, if the
        classes are WordNet numbers, as ImageNet's are). What they retain of it bypasses clipping and noise,
        and no epsilon covers it. Renamed copies cannot be detected, nor can weights from a run with a secret
        seed, which name their data by a keyed hash; the user vouches for those. Other errors as in `load`.
    """
    if not name_or_path:
        return None
    seen = saw(name_or_path)
    if private is not None:  # refused before they are downloaded and converted
        _refuse_seen(name_or_path, private, seen)
    content = identity(load(name_or_path))
    return {"weights": pathlib.Path(name_or_path).name, "sha256": content, "saw": seen}


def _refuse_seen(name_or_path: str, private: Dataset, seen: str) -> None:
    """Refuses weights that name the private data among what they saw: by name, fingerprint or classes."""
    wordnet = sum(re.fullmatch(r"n\d{8}", name) is not None for name in private.classes)
    called = [private.name, *["imagenet"] * (2 * wordnet > len(private.classes))]
    if private.fingerprint in seen or any(names(name, seen) for name in called):
        raise ValueError(
            f"public weights must not have seen the private data ({', also known as '.join(called)}), got "
            f"{name_or_path}, trained on {seen}; take others, or train from scratch"
        )


def names(name: str, text: str) -> bool:
    """Returns whether a text names a data set, however it is spelt.  All ImageNets count as one.

    >>> names("cifar10", "CIFAR-10, as it was"), names("cifar10", "CIFAR-100")
    (True, False)
    """
    name, text = re.split("[:/]", name.lower())[0], text.lower()  # without version and configuration
    if re.search(IMAGENETS, name):
        return re.search(IMAGENETS, text) is not None
    spelt = "[-_ /]*".join(re.findall("[a-z]+|[0-9]+", name))
    return re.search(rf"(?<![a-z0-9]){spelt}(?![a-z0-9])", text) is not None


def pack(path: str | pathlib.Path) -> bytes:
    """Returns a safetensors file with the same parameters in float16, at half the size, and what they saw.

    Raises:
      ValueError: values are not finite in float16. Other errors as in `load`.
    """
    return packed(load(path), saw(path), path)


def packed(weights: Arrays, saw: str, source="a network") -> bytes:
    """Returns a safetensors file with these parameters in float16, and with what they saw.

    Raises:
      ValueError: values are not finite in float16; the message names the source.
    """
    with np.errstate(over="ignore"):  # refused below
        half = {name: array.astype(np.float16) for name, array in sorted(weights.items())}
    if not all(np.isfinite(array).all() for array in half.values()):
        raise ValueError(
            f"{source} has values that are not finite in float16, beyond 65504; keep it as it is"
        )
    return serialised(half, {"saw": saw})


def _check(name: str, content: bytes, sha256: str, source) -> None:
    got = hashlib.sha256(content).hexdigest()
    if got != sha256:
        raise ValueError(f"{name}: SHA-256 must be {sha256}, got {got} from {source}; it is not used")


def convert(published: str | pathlib.Path | bytes, weights: Weights) -> Arrays:
    """Converts a published file to our parameters, float32.

    Args:
      published: the authors' pickle {"params": ..., "network_state": ...}, the directory of their Orbax
        checkpoint {"params": ..., "state": ...}, or timm's safetensors; or the content of a file.
      weights: the network that it should hold.
    Raises:
      ValueError: the file has another format (`unpickle.Refused`), or holds another network.
    """
    kind, _, size = weights.network.rpartition("-")
    if weights.published_as == "timm":
        content = published if isinstance(published, bytes) else pathlib.Path(published).read_bytes()
        if kind == "nfnet":
            return conversion.nfnet_from_timm(parse(content), nfnet.DEPTHS[size])
        return conversion.nf_resnet_from_timm(parse(content), nf_resnet.DEPTHS[int(size)])
    tree = _orbax(published) if weights.published_as == "orbax" else unpickle.load(published)
    if not isinstance(tree, dict) or not isinstance(tree.get("params"), dict):
        raise ValueError("the file must hold a dict with the key 'params', got something else")
    if kind == "nfnet":
        return conversion.nfnet_from_haiku(tree["params"], nfnet.DEPTHS[size])
    return conversion.wide_resnet_from_haiku(tree["params"], weights.shape[0])


def _orbax(directory: str | pathlib.Path):
    """Reads all arrays of an Orbax checkpoint, as numpy arrays; such a file contains no code."""
    import orbax.checkpoint

    if isinstance(directory, bytes) or not pathlib.Path(directory).is_dir():
        raise ValueError(
            "an Orbax checkpoint is a directory; copy it whole (`gsutil cp -r`) and pass its path"
        )
    reader, where = orbax.checkpoint.PyTreeCheckpointer(), pathlib.Path(directory).absolute()
    like = reader.metadata(where).item_metadata.tree
    as_numpy = jax.tree.map(lambda _: orbax.checkpoint.RestoreArgs(restore_type=np.ndarray), like)
    return reader.restore(where, restore_args=as_numpy)
