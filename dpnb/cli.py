"""`dpnb list | run | plan | table | verify | notebooks | cache | doctor`: a thin shell over papermill and the records."""

import argparse
import ast
import contextlib
import functools
import json
import os
import pathlib
import sys
import warnings
from typing import Any

import dpnb
from dpnb import cache, experiments, folders
from dpnb.commands import joining
from dpnb.commands.copying import copy_notebooks
from dpnb.commands.execution import NotebookFailed, execute, known_parameters
from dpnb.experiments import Experiment, cifar10, digits, studies
from dpnb.experiments.changes import FIELDS, unknown
from dpnb.files import private_folder, readable_size, writable_folder, write_atomic

NOTEBOOK = "cifar10_from_scratch.ipynb"
# Fields with an option of their own, which --set does not replace.
OPTIONS = {
    "name": "the first argument", "preset": "--preset", "seed": "--seed N, --seeds N or --secret-seed",
    "data_note": "--data-note",
}  # fmt: skip
# By the first part of a name, or its first two; else NOTEBOOK.
NOTEBOOKS_OF = {"pretrain": "pretrain_public.ipynb", "imagenet/scratch": "imagenet_from_scratch.ipynb"}
_STUDIES = {f"cifar10/{study}": notebook for study, notebook in studies.STUDIES.items()}
# What `dpnb run STUDY` executes, with the cells STUDY/*.
STUDY_NOTEBOOKS = _STUDIES | digits.STUDIES
# What draws the figures of a sweep, from its records alone.
FIGURES = {
    **{f"{name}/finetune": "cifar_finetune.ipynb" for name in ("cifar10", "cifar100")},
    **{f"{name}/finetune": "imagenet_finetune.ipynb" for name in ("imagenet", "places365")},
    **_STUDIES,
}
RECORDS = "directory of records (default: results, else those that come with dpnb)"
# The rows of the table in the README, (experiment, preset).
README_ROWS = (
    ("cifar10/wrn-16-4/eps8", "teach"),
    ("cifar10/patch-linear/eps1", "paper"),
    ("cifar10/patch-linear/eps3", "paper"),
    ("cifar10/patch-linear/eps8", "paper"),
    ("cifar10/scatter-linear/eps1", "paper"),
    ("cifar10/scatter-linear/eps3", "paper"),
    ("cifar10/finetune/all/eps1", "teach"),
    ("cifar10/finetune/classifier/eps1", "teach"),
    ("cifar10/finetune/scratch/eps1", "teach"),
    ("cifar10/finetune/textures-all/eps1", "teach"),
)
# What `dpnb table NAME` shows: all rows of a pattern, or an excerpt.
TABLES: dict[str, str | tuple[tuple[str, str], ...]] = {
    "imagenet": "[ip][ml]a*/*/*",
    "cifar10": "cifar10/[wsp]*/eps*",
    "finetune": "cifar*/finetune/*",
    "digits": "digits/*",
    "readme": README_ROWS,
}


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="dpnb", description="Private image classification, reproduced.")
    parser.add_argument("--version", action="version", version=f"dpnb {folders.version()}")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("list", help="experiments, what the paper reports, and their status")
    add.add_argument("pattern", nargs="?", default="*", help="shell pattern, e.g. 'cifar10/*'")
    add.add_argument("--results", default=folders.records(), help=RECORDS)
    add = commands.add_parser(
        "run",
        help="execute an experiment's notebook with papermill, or a sweep",
        epilog="hyper-parameters for --set KEY=VALUE, by group:\n\n" + experiments.describe_fields(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add.add_argument(
        "name", help="as `dpnb list` shows it, a study of several (digits/demo), or a shell pattern: a sweep"
    )
    add.add_argument("--preset", choices=experiments.PRESETS, default="smoke")
    add.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a hyper-parameter (listed below)",
    )
    add.add_argument("--seed", type=int, default=0)
    add.add_argument("--seeds", type=int, metavar="N", help="seeds 0 ... N - 1 of each: a sweep")
    add.add_argument(
        "--secret-seed", action="store_true", help="draw it, keep it private: if data are not public"
    )
    add.add_argument(
        "--minutes", type=float, metavar="M",
        help="stop in time, with a checkpoint; the same command goes on (exit status 3 if it has to)",
    )  # fmt: skip
    add.add_argument("--out", type=pathlib.Path, help="directory (default runs/NAME/PRESET-seedSEED)")
    add.add_argument(
        "--data-dir",
        default="",
        help="TFDS directory, or of photographs NAME/train/CLASS/IMAGE, NAME/val/...",
    )
    add.add_argument("--data-file", default="", help="prepared array file (.npz) instead of TFDS")
    add.add_argument("--data-note", default="", help="caveat about the data, copied into the record")
    add = commands.add_parser("plan", help="what an experiment would take on accelerators")
    add.add_argument("name", help="as `dpnb list` shows it")
    add.add_argument("--preset", choices=experiments.PRESETS, default="paper")
    add.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for `dpnb run`")
    add.add_argument("--devices", type=int, default=1, metavar="N", help="so many of each accelerator")
    add.add_argument("--results", default=folders.records(), help=RECORDS)
    add = commands.add_parser("table", help="paper | ours | difference")
    add.add_argument("name", help="cifar10, finetune, imagenet, digits, readme, or a shell pattern")
    add.add_argument("--results", default=folders.records(), help=RECORDS)
    add.add_argument("--markdown", action="store_true")
    add.add_argument("--write", type=pathlib.Path, metavar="FILE", help="put it between FILE's table markers")
    add = commands.add_parser("verify", help="hold a record against its files, the registry, and the data")
    add.add_argument("record", type=pathlib.Path, help="directory of a run, or of its release")
    add.add_argument("--data-dir", default=None)
    add.add_argument("--data-file", default=None)
    add = commands.add_parser("notebooks", help="copy the notebooks, to open and change them")
    add.add_argument("directory", type=pathlib.Path, help="where to; files that are there are left alone")
    add.add_argument(
        "--for-class", action="store_true",
        help="twice: to students/ with lectures without solutions, to answers/ with their solutions shown",
    )  # fmt: skip
    add = commands.add_parser("cache", help="list or clear what is kept on disk because it is slow to make")
    add.add_argument("--clear", nargs="?", const="all", choices=("all", *cache.KINDS), metavar="KIND",
                     help=f"remove it all, or one of {', '.join(cache.KINDS)}")  # fmt: skip
    add = commands.add_parser("doctor", help="one screen about this installation, for a bug report")
    add.add_argument("--out", default=folders.runs(), help="directory of runs that is tried")
    add.add_argument("--data-dir", default=None, help="TFDS directory")
    parser.set_defaults(joined=False)
    options = parser.parse_args(arguments)
    run_command = {
        "list": list_, "run": run, "plan": plan, "table": table, "verify": verify, "notebooks": notebooks, "cache": cache_,
        "doctor": doctor_,
    }  # fmt: skip
    try:
        if options.command == "run" and (terms := joining.find_terms(os.environ)) is not None:
            if joining.JOINS not in os.environ:
                # With the path of this process: a module of the working directory must not take part.
                again = f"import sys; sys.path[:] = {sys.path!r}; from {__spec__.name} import main; sys.exit(main())"
                words = sys.argv[1:] if arguments is None else arguments
                return joining.watch([sys.executable, "-c", again, *words])
            from dpnb import sweep  # noqa: F401  imports take long, and others wait for seconds only

            asked = {
                name: str(value) for name, value in vars(options).items() if not name.startswith("data_")
            }
            joining.join(terms, json.dumps(asked))
            options.joined = True
        with left_out_in_one_line():
            return run_command[options.command](options)
    except BrokenPipeError:  # `dpnb list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except NotebookFailed as failed:
        print(f"dpnb: {options.name} failed: {failed}", file=sys.stderr)
        print(f"dpnb: the notebook up to there is {failed.unfinished}")
        return 1
    except OSError as error:
        named = error.strerror and error.filename is not None
        print(f"dpnb: {f'{error.filename}: {error.strerror}' if named else error}", file=sys.stderr)
    except (KeyError, TypeError, ValueError) as error:
        print(f"dpnb: {error.args[0] if error.args else type(error).__name__}", file=sys.stderr)
    except RuntimeError as error:
        from dpnb.training.hosts import AnotherProcessFailed

        if not isinstance(error, AnotherProcessFailed):
            raise
        print(f"dpnb: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        where = "from its last checkpoint" if options.joined else "where it stopped"
        print(f"dpnb: stopped; the same command goes on {where}", file=sys.stderr)
        return 130
    return 2


@contextlib.contextmanager
def left_out_in_one_line():
    """Prints every different warning `LeftOut`, that a record is in no table, once and as one line."""
    from dpnb.results import LeftOut

    with warnings.catch_warnings():
        warnings.simplefilter("always", LeftOut)
        show, said = warnings.showwarning, set()

        def once(message, category, *where):
            if not issubclass(category, LeftOut):
                show(message, category, *where)
            elif str(message) not in said:
                said.add(str(message))
                print(f"dpnb: {message}", file=sys.stderr)

        warnings.showwarning = once
        yield


def list_(options) -> int:
    """Prints a line for each experiment: its budget, the published number, and the status of ours."""
    from dpnb import results

    if not experiments.names(options.pattern):
        raise KeyError(f"no experiment matches {options.pattern!r}; `dpnb list` shows all")
    records = results.load(options.results)
    for name in experiments.names(options.pattern):
        e = experiments.get(name)
        paper = results.spread(e.paper_mean, e.paper_std) + (" %" if e.paper_mean else "")
        status = results.status(e, records)
        source = e.paper_source.replace(cifar10.UNVERIFIED, "unverified")
        source += f"; {e.impossible}" if e.impossible else ""
        print(f"{name:42} epsilon {_epsilon(e)}, delta {e.delta:g}  paper: {paper:14} {status:24} {source}")
    return 0


def _epsilon(e: Experiment) -> str:
    return "of its noise" if e.epsilon is None else f"{e.epsilon:g}"


def changes(pairs: list[str]) -> dict[str, Any]:
    """["steps=10", "sampler=shuffle"] as {"steps": 10, "sampler": "shuffle"}; `Experiment` checks the values.

    Raises:
      ValueError: it is not KEY=VALUE, or the key is not for --set.

    >>> changes(["steps=10", "epsilon=inf", "sampler=shuffle"])
    {'steps': 10, 'epsilon': inf, 'sampler': 'shuffle'}
    """
    made = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--set takes KEY=VALUE, got {pair!r}")
        if key not in FIELDS:
            raise ValueError(unknown(key))
        if key in OPTIONS:
            raise ValueError(f"--set must leave {key} alone, got {pair!r}; it is {OPTIONS[key]}")
        made[key] = _value(text, FIELDS[key])
    return made


def _value(text: str, annotation: Any) -> Any:
    """Reads the value of a field: a Python literal or inf; else, and for a field of text, it is the text."""
    if text in ("inf", "-inf"):
        return float(text)
    try:
        with warnings.catch_warnings(action="ignore"):  # of "1or", which is text
            value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return value if annotation is not str or value is None or isinstance(value, str) else text


def several(options) -> bool:
    """Is it more than one run that was asked for: seeds, or a pattern of names?"""
    return options.seeds is not None or any(c in options.name for c in "*?[")


def seed_of(options) -> int | None:
    """Returns the seed that was asked for; None for a secret one."""
    return None if options.secret_seed else options.seed


def by_notebook(options) -> bool:
    """Is it one run, which its notebook makes unless several processes do?"""
    if several(options):
        return False
    e = experiments.get(options.name, options.preset, **changes(options.set))
    return not e.on_features and "/finetune/" not in options.name


def place_of(options) -> pathlib.Path:
    """Returns the directory of one run by its notebook: what was asked for, or where it belongs below `folders.runs()`."""
    from dpnb import sweep

    e = experiments.get(options.name, options.preset, seed=seed_of(options), **changes(options.set))
    return options.out or sweep.directory(folders.runs(), e)


def cells_of(options) -> tuple[list[Experiment], bool]:
    """Returns the runs of a sweep, and whether they read digits in place of photographs.

    Raises:
      KeyError, ValueError, TypeError: nothing matches, or it cannot be run so.
    """
    from dpnb import sweep

    if options.secret_seed and several(options):
        raise ValueError(
            "a sweep has published seeds, got --secret-seed; run one experiment at a time with it"
        )
    asked, seeds = changes(options.set), 1 if options.seeds is None else options.seeds
    plan = functools.partial(sweep.plan, options.name, options.preset, seeds, data_note=options.data_note)
    todo = plan(**asked)
    given = options.data_dir or "dataset" in asked
    if embedded := options.preset == "smoke" and bool(todo[0].image_size) and not given:
        todo = plan(**asked, dataset="digits")
    if options.seeds is None:
        todo = [e.replace(seed=seed_of(options)) for e in todo]
    if impossible := [e for e in todo if e.impossible and options.preset == "paper"]:
        raise ValueError(f"{impossible[0].name} cannot be run in public: {impossible[0].impossible}")
    return todo, embedded


def run_sweep(options) -> int:
    """Every cell of a pattern, in this process: no notebooks, the same records."""
    from dpnb import data, results, sweep
    from dpnb.training import hosts, pace

    end, (todo, embedded) = pace.deadline(options.minutes), cells_of(options)
    # Where its notebook puts a run, it goes on among several processes.
    place = place_of(options) if by_notebook(options) else None
    root = place or options.out or folders.runs()
    hosts.call_on_process_0(lambda: str(writable_folder(root)))  # before hours are spent
    hosts.check_shared(root)
    if embedded:
        from dpnb.data import stand_ins

        options.data_dir = root / "photographs"
        hosts.call_on_process_0(lambda: str(stand_ins.write_stand_ins("digits", options.data_dir)))
        print(f"no --data-dir: digits, as JPEG files below {options.data_dir}")
    read = functools.partial(
        data.load, todo[0].dataset, image_size=todo[0].image_size, data_dir=options.data_dir or None,
        file=options.data_file or None, validation=todo[0].validation, note=options.data_note,
    )  # fmt: skip
    loaded = hosts.call_on_all(read)
    dpnb.use_compilation_cache()
    say = functools.partial(print, flush=True)
    made = sweep.run(todo, loaded, root, say=say, deadline=end, place=place)
    frame = results.summary([e for e in todo if e.seed == todo[0].seed], made.records)
    print("\n" + results.tidy(frame.drop(columns=["first", "note"])).to_string(index=False))
    print(f"records: {root}")
    for study in sorted({"/".join(e.name.split("/")[:2]) for e in todo} & set(FIGURES)):
        if folders.INSTALLED:
            where = f"output_dir = {str(root.absolute())!r}"
            print(
                f"figures: {FIGURES[study]}, which `dpnb notebooks DIR` copies, with train = False, {where}"
            )
        else:
            print(f"figures: notebooks/{FIGURES[study]} with train = False")
    return sweep_status(made, len(todo))


def sweep_status(made, planned: int) -> int:
    """Returns the exit status of a sweep: 1 if a run failed, 3 if the same command goes on, else 0."""
    from dpnb.training import pace

    if made.failures:
        return 1
    in_time = any(pace.goes_on(r["stopped"]) for r in made.records)
    return 3 if in_time or len(made.records) < planned else 0


def run_study(options) -> int:
    """Executes the notebook of a study, which trains what is not finished and shows tables and figures."""
    from dpnb import sweep

    cells, seeds = f"{options.name}/*", 1 if options.seeds is None else options.seeds
    asked = changes(options.set)
    sweep.plan(cells, options.preset, seeds, **asked)  # refuses before it starts
    notebook, root = notebook_of(STUDY_NOTEBOOKS[options.name]), options.out or folders.runs()
    given = dict(pattern=cells, preset=options.preset, seeds=seeds, changes=asked, **data_parameters(options))
    given["minutes"] = options.minutes
    given["output_dir"] = str(root.absolute())
    known = known_parameters(notebook)
    if unknown := [name for name in given if given[name] and name not in known]:
        raise ValueError(
            f"{notebook.name} must be given its own parameters, got {', '.join(unknown)} as well"
        )
    kept = writable_folder(root / options.name)
    executed = execute(notebook, {n: v for n, v in given.items() if n in known}, out=kept, kept=kept)
    print(f"notebook: {executed}")
    return study_status(cells, root, options)


def study_status(cells: str, root: pathlib.Path, options) -> int:
    """Returns the exit status of a study: 3 if it was to end in time, and cells are left for the same command, else 0."""
    from dpnb import results, sweep
    from dpnb.training import pace

    seeds = 1 if options.seeds is None else options.seeds
    planned = sweep.plan(cells, options.preset, seeds, **changes(options.set))
    made = results.load(root) if options.minutes else []

    def over(e):  # finished, or ended for another reason than time
        same = [r for r in made if (r["experiment"], r["preset"]) == (e.name, e.preset)]
        ended = [r for r in same if not pace.goes_on(r["stopped"])]
        return any(r["seed"] == e.seed for r in [*ended, *results.matching_records(e, made)])

    left = [e for e in planned if not over(e)]
    if not options.minutes or not left:
        return 0
    print(f"{len(left)} of {len(planned)} runs are left; the same command goes on")
    return 3


def run(options) -> int:
    """Executes the notebook of one experiment or study with papermill, or hands several to `run_sweep`."""
    if options.name in STUDY_NOTEBOOKS:
        if options.secret_seed or options.seed:
            raise ValueError(
                "a study runs the published seeds 0 ... N - 1 of each cell; choose N with --seeds"
            )
        if not options.joined:
            return run_study(options)
        options.name += "/*"
    first, *rest = options.name.split("/")
    if first == "pretrain" and options.secret_seed:
        raise ValueError("pre-training promises no privacy, so its seed is public; leave out --secret-seed")
    if options.joined or not by_notebook(options):
        return run_sweep(options)

    from dpnb.training import pace

    pace.deadline(options.minutes)  # refuses before it starts
    asked, seed, out = changes(options.set), seed_of(options), place_of(options)  # refuses before it starts
    parameters = dict(
        experiment=options.name, preset=options.preset, seed=seed, changes=asked, **data_parameters(options),
        output_dir=str(out.absolute()), minutes=options.minutes,
    )  # fmt: skip
    name = NOTEBOOKS_OF.get("/".join([first, *rest[:1]]), NOTEBOOKS_OF.get(first, NOTEBOOK))
    notebook = notebook_of(name)
    # The executed notebook of a secret run shows training images; a copy without them comes beside the weights.
    private = private_folder(writable_folder(out), seed is None)
    executed = execute(notebook, parameters, out=out, kept=private)
    from dpnb import results
    from dpnb.results import release

    released = seed is None and (out / "release").is_dir()  # not without a privacy claim
    folder = out / "release" if released else private
    record = folder / release.RECORD
    made = json.loads(record.read_text())
    print("\n" + results.row(made))
    print(f"record: {record}\nfigure: {private / 'curve.png'}\nnotebook: {executed}")
    if released:
        copy = release.notebook(json.loads(executed.read_text()))
        write_atomic(folder / name, json.dumps(copy, indent=1, ensure_ascii=False) + "\n")
        print(f"may be published, see privacy.md there: {folder}")
    if pace.goes_on(made["stopped"]):
        print(f"{made['stopped']}, by the same command")
        return 3
    return 0


def plan(options) -> int:
    """Prints what an experiment would take on accelerators."""
    from dpnb.results.plan import report

    e = experiments.get(options.name, options.preset, **changes(options.set))
    print(report(e, options.results, options.devices))
    return 0


def notebook_of(name: str) -> pathlib.Path:
    """Returns the path of a notebook.

    Raises:
      FileNotFoundError: this is an installation without notebooks.
    """
    if not (folders.NOTEBOOKS / name).exists():
        raise FileNotFoundError(
            f"`dpnb run` executes a notebook, and there is no {folders.NOTEBOOKS / name}; install dpnb again"
        )
    return folders.NOTEBOOKS / name


def data_parameters(options) -> dict[str, str]:
    """Returns data_dir, data_file and data_note for a notebook, which runs in another folder."""
    return dict(
        data_dir=str(options.data_dir and pathlib.Path(options.data_dir).absolute()),
        data_file=str(options.data_file and pathlib.Path(options.data_file).absolute()),
        data_note=options.data_note,
    )


def table(options) -> int:
    """Prints a table of records, or puts it between the markers of a document."""
    from dpnb import results

    asked = TABLES.get(options.name, options.name)
    if isinstance(asked, str) and not experiments.names(asked):
        raise KeyError(f"no experiment matches {asked!r}; see `dpnb list`")
    if not pathlib.Path(options.results).is_dir():
        print(f"dpnb: no directory {options.results}, so no run of ours is in the table", file=sys.stderr)
    records = results.load(options.results)
    frame = (results.table if isinstance(asked, str) else results.excerpt)(asked, records)
    if frame.empty:
        why = f"of {asked} neither the paper has a number nor we a run"
        print(f"dpnb: the table has no row: {why}", file=sys.stderr)
    if options.write:
        write_atomic(options.write, results.insert(options.write.read_text(), options.name, frame))
    elif options.markdown or not frame.empty:
        print(results.markdown(frame) if options.markdown else frame.to_string(index=False))
    return 0


def verify(options) -> int:
    """Prints what was checked of a record; returns 0 if all holds, 3 if not all could be checked, else 1."""
    from dpnb.results import verification

    report = verification.verify(options.record, data_dir=options.data_dir, data_file=options.data_file)
    print("\n".join(report.lines))
    print("ok, complete" if report.ok and report.complete else "ok, incomplete" if report.ok else "FAILED")
    return 1 if not report.ok else 0 if report.complete else 3


def notebooks(options) -> int:
    """Copies the notebooks to a directory, and prints which were there already."""
    if options.for_class:
        from dpnb.commands.classes import copy_for_class

        copied, left = copy_for_class(options.directory)
    else:
        copied, left = copy_notebooks(options.directory)
    print(f"notebooks copied to {options.directory}: {len(copied)}")
    if left:
        print(f"left alone, since they are there: {', '.join(map(str, left))}")
    return 0


def cache_(options) -> int:
    """Prints a line for each entry of the cache on disk, the last used first, or clears it."""
    if options.clear:
        freed = cache.clear(None if options.clear == "all" else options.clear)
        print(f"{readable_size(freed)} removed from {cache.folder()}")
        return 0
    found = cache.entries()[::-1]
    for entry in found:
        age, idle = (_ago(seconds) for seconds in (entry.age, entry.idle))
        print(f"{entry.kind:10} {readable_size(entry.size):>9}  made {age:>9}, used {idle:>9}  {entry.what}")
    print(
        f"{readable_size(sum(e.size for e in found))} of {readable_size(cache.bound())} in {cache.folder()}"
    )
    return 0


def doctor_(options) -> int:
    """Prints what a bug report needs to say of this installation; returns 1 if something is wrong with it."""
    from dpnb.commands import doctor

    return doctor.report(options.out, options.data_dir)


def _ago(seconds: float) -> str:
    """
    >>> _ago(59), _ago(3600 * 5), _ago(86400 * 3.4)
    ('now', '5 h ago', '3 d ago')
    """
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "now"


if __name__ == "__main__":
    sys.exit(main())
