"""Prepares CIFAR-10 and CIFAR-100 with TFDS's own builders, on machines without TensorFlow."""

import io
import os
import pathlib
import tarfile
import zlib

import numpy as np

from dpnb.data.dataset import INSTALL, DataError, Unreachable
from dpnb.data.tfds import command, tfds_or_error


def prepare(name: str, data_dir=None) -> pathlib.Path:
    """Downloads CIFAR and prepares it with TFDS's own builder, without TensorFlow (about a minute).

    A line says what is downloaded, how large it is and where it goes; then there are TFDS's progress bars.
    The files, version, order and checksum are those of an ordinary TFDS installation (array_record).

    Args:
      name: "cifar10" or "cifar100".
      data_dir: TFDS directory; None for TFDS's own default.
    Returns:
      The directory of the prepared data set; nothing is done if it already exists.
    Raises:
      Unreachable: there is no network, or the download failed.
      DataError: another name, TFDS is missing, or the archive is damaged or unknown.
    """
    if name not in ("cifar10", "cifar100"):
        raise DataError(f"only cifar10 and cifar100 are prepared, got {name!r}")
    tfds = tfds_or_error()
    if data_dir is not None:
        data_dir = os.path.abspath(os.path.expanduser(data_dir))
    try:
        builder = _builder(tfds, name)(data_dir=data_dir, file_format="array_record")
        if not builder.data_path.exists():
            print(_announce(builder), flush=True)
        builder.download_and_prepare()
    except ImportError as error:
        raise DataError(f"preparing {name} needs another package ({error}); run: {INSTALL}") from error
    return pathlib.Path(builder.data_path)


def _builder(tfds, name: str) -> type:
    """Returns TFDS's CIFAR builder, changed to extract and encode images without TensorFlow."""

    class WithoutTensorFlow(tfds.builder_cls(name), skip_registration=True):
        # Otherwise TFDS looks for its checksums beside this file, through importlib_resources, a
        # package that it does not declare. With None it uses the checksums that it ships.
        code_path = None

        def _split_generators(self, dl_manager):
            info = self._cifar_info
            archive = _download(dl_manager, info, self.data_dir_root)
            wanted = [info.prefix + f for f in (*info.label_files, *info.train_files, *info.test_files)]
            found = _read_archive(archive, wanted)
            for key, file in zip(info.label_keys, info.label_files, strict=True):
                names = found[info.prefix + file].decode().split("\n")
                self.info.features[key].names = [n for n in names if n]

            def rows(prefix, files):
                return _rows(prefix, {f: found[info.prefix + f] for f in files}, info.label_keys)

            return {"train": rows("train", info.train_files), "test": rows("test", info.test_files)}

    WithoutTensorFlow.name = name
    return WithoutTensorFlow


def _by_hand(info, root) -> str:
    """Says what to do without a network."""
    file = info.url.rsplit("/", 1)[-1]
    return (
        f"download {info.url} elsewhere, put it at {pathlib.Path(root) / 'downloads' / 'manual' / file} and "
        f"run again: {command(info.name, root)}; or pass `file` (an .npz exported elsewhere)"
    )


def _announce(builder) -> str:
    """Says what comes from where; asks the server once, as TFDS itself would retry for minutes before giving up."""
    import requests

    info, root = builder._cifar_info, pathlib.Path(builder.data_dir_root)
    stem = info.url.rsplit("/", 1)[-1].removesuffix(".tar.gz")
    if any((root / "downloads").rglob(f"*{stem}*.tar.gz")):
        return f"preparing {info.name} in {root}, once, from the archive that is there"
    try:
        headers = requests.head(info.url, timeout=20, allow_redirects=True).headers
    except requests.RequestException as error:
        raise Unreachable(
            f"no network to {info.url} ({type(error).__name__}); {_by_hand(info, root)}"
        ) from error
    size = int(headers.get("content-length", 0))
    return f"downloading {info.url}{f', {size / 1e6:.0f} MB,' * bool(size)} to {root}, once; then it is prepared there"


def _download(dl_manager, info, root) -> pathlib.Path:
    import requests
    from tensorflow_datasets.core.download import download_manager, util

    try:
        return pathlib.Path(dl_manager.download(info.url))
    except download_manager.NonMatchingChecksumError as error:
        raise DataError(
            f"the archive is incomplete or not the known one ({error}); delete it and run again"
        ) from error
    except (requests.RequestException, util.DownloadError) as error:
        raise Unreachable(
            f"the download failed ({type(error).__name__}: {error}); {_by_hand(info, root)}"
        ) from error


def _read_archive(path: pathlib.Path, wanted: list[str]) -> dict[str, bytes]:
    """Reads the wanted members of a .tar.gz, by name; nothing is extracted to disk."""
    found = {}
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:  # one pass: going back would decompress from the start
                name = member.name.removeprefix("./")
                if name in wanted and member.isfile():
                    found[name] = tar.extractfile(member).read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}); delete it and run again") from error
    missing = [name for name in wanted if name not in found]
    if missing:
        raise DataError(f"{path} must hold {', '.join(missing)} and does not; delete it and run again")
    return found


def _rows(prefix: str, files: dict[str, bytes], label_keys: list[str]):
    """Yields TFDS's examples from CIFAR's binary records: labels, then 3x32x32 bytes, plane by plane."""
    from PIL import Image

    index, size = 0, len(label_keys) + 3072
    for name, content in files.items():
        if len(content) % size:
            raise DataError(
                f"{name} must be whole records of {size} bytes, got {len(content)} bytes; delete it"
            )
        for record in np.frombuffer(content, np.uint8).reshape(-1, size):
            pixels = record[len(label_keys) :].reshape(3, 32, 32).transpose(1, 2, 0)
            png = io.BytesIO()  # TFDS would need TensorFlow to encode an array
            Image.fromarray(np.ascontiguousarray(pixels)).save(png, format="PNG")
            png.seek(0)
            labels = dict(zip(label_keys, map(int, record), strict=False))
            # The index as the key gives TFDS's own order.
            yield index, {"id": f"{prefix}_{index:05d}", "image": png, **labels}
            index += 1
