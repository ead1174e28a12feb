"""Prepares data sets (once) and exports array files.

python -m dpnb.data cifar10 --data-dir DIR                 # download and prepare, once
python -m dpnb.data cifar10 --data-dir DIR --npz FILE      # and export one array file
"""

import argparse

from dpnb.data.cifar import prepare
from dpnb.data.dataset import CLASSES, DataError
from dpnb.data.loading import load, save


def main(arguments=None) -> None:
    """Runs `python -m dpnb.data` with these arguments (default: the command line's).

    Raises:
      SystemExit: the data are not available (the message says why), or the arguments are bad.
    """
    parser = argparse.ArgumentParser(
        prog="python -m dpnb.data", description="Download and prepare a data set (once), and export it."
    )
    parser.add_argument("name", choices=list(CLASSES))
    parser.add_argument("--data-dir", help="TFDS directory; without it TFDS's default")
    parser.add_argument("--npz", metavar="FILE", help="also write one array file, for machines without TFDS")
    parser.add_argument("--note", default="", help="a caveat about the data, kept in the array file")
    args = parser.parse_args(arguments)
    try:
        if args.name.startswith("cifar"):
            prepare(args.name, args.data_dir)
        data = load(args.name, data_dir=args.data_dir, note=args.note)
        if args.npz:
            save(data, args.npz)
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{data.name}: {len(data.train)} train, {len(data.test)} test, sha256 {data.fingerprint}")


if __name__ == "__main__":
    main()
