"""Pages of the public names of each package, from their docstrings."""

import dataclasses
import importlib
import inspect
import itertools
import pathlib
import re

PACKAGES = ("privacy", "gradients", "data", "models", "experiments", "training", "results")
COMMENT = r"^{name}\b[^\n=]*=[^\n]*?  # (?P<text>[^\n]*)$"
SPAN = re.compile(r"(?<![`:\w])`([^`\n]+)`(?![`_])")
STAR = re.compile(r"(?<!\*)\*(?!\*)(?!\w[^*]*\w\*(?!\w))(?<!\w\*)")  # none that stands around a word
SECTION = re.compile(r"(Args|Returns|Raises|Yields):$")
ITEM = re.compile(r"[a-z_][\w, ]{0,40}: ")


def write(source: pathlib.Path) -> None:
    """Writes one page per package and one for `dpnb` itself, whose names lie in the packages."""
    folder = source / "api"
    folder.mkdir(parents=True)
    toctree = ".. toctree::\n   :hidden:\n\n" + "".join(f"   dpnb.{name}\n" for name in PACKAGES)
    for name in PACKAGES:
        package = importlib.import_module(f"dpnb.{name}")
        parts = [heading(package.__name__), documentation(package)]
        parts += [entry(package, public) for public in sorted(package.__all__, key=str.lower)]
        (folder / f"{package.__name__}.rst").write_text("\n\n".join(parts) + "\n")
    dpnb = importlib.import_module("dpnb")
    parts = [heading("Public names", "dpnb"), toctree, documentation(dpnb), listing(dpnb)]
    parts.append(entry(dpnb, "use_compilation_cache"))
    (folder / "index.rst").write_text("\n\n".join(parts) + "\n")


def heading(text: str, module: str | None = None) -> str:
    """Returns the title of a page, and the module that its names belong to."""
    return f"{text}\n{'=' * len(text)}\n\n.. py:module:: {module or text}"


def documentation(module) -> str:
    """Returns the docstring of a module in reStructuredText."""
    return "\n".join(map(marked, inspect.getdoc(module).splitlines()))


def home(package, name: str) -> str | None:
    """Returns the package in which a name of `dpnb` is documented."""
    value = getattr(package, name)
    found = [p for p in PACKAGES if value is getattr(importlib.import_module(f"dpnb.{p}"), name, None)]
    return f"dpnb.{found[0]}" if found else None


def listing(package) -> str:
    """Returns a table of the names of `dpnb`, each with a link and the first sentence about it."""
    rows = []
    for name in sorted(package.__all__, key=str.lower):
        about = inspect.getdoc(getattr(package, name)).split("\n\n")[0].replace("\n", " ")
        where = home(package, name) or "dpnb"
        rows.append(f"   * - :py:obj:`{name} <{where}.{name}>`\n     - {marked(about)}")
    return ".. list-table::\n   :header-rows: 1\n\n   * - name\n     - what it is\n" + "\n".join(rows)


def entry(package, name: str) -> str:
    """Returns the directive that documents a public name."""
    value, full = getattr(package, name), f"{package.__name__}.{name}"
    if inspect.isclass(value):
        if described(value):
            return f".. autoclass:: {full}(**fields)\n   :members:\n\n{fields(value)}"
        return f".. autoclass:: {full}\n   :members:"
    if inspect.isfunction(value):
        return f".. autofunction:: {full}"
    shown = " ".join(repr(value).split())
    shown = shown if len(shown) <= 90 and " at 0x" not in shown else ""
    text = f".. py:data:: {name}\n" + (f"   :value: {shown}\n" if shown else "")
    return f"{text}\n   {comment(package, name, value)}".rstrip()


def comment(package, name: str, value) -> str:
    """Returns what the source says beside a constant; else, of a table, its keys."""
    for path in sorted(pathlib.Path(package.__file__).parent.glob("*.py")):
        if found := re.search(COMMENT.format(name=name), path.read_text(), re.MULTILINE):
            text = found["text"].removeprefix("type: ignore").strip()
            if text and not text.startswith("fmt:"):
                return marked(text[0].upper() + text[1:]) + "."
    return f"Its keys are {', '.join(f'``{key}``' for key in value)}." if isinstance(value, dict) else ""


def described(value: type) -> bool:
    """Returns whether the fields of a class carry their documentation with them."""
    return dataclasses.is_dataclass(value) and any(f.metadata.get("about") for f in dataclasses.fields(value))


def fields(value: type) -> str:
    """Returns a table of the fields of a class."""
    rows = ["* - field", "  - group", "  - default", "  - what it is"]
    for f in dataclasses.fields(value):
        default = "" if f.default is dataclasses.MISSING else f" ``{f.default!r}``"
        rows += [
            f"* - ``{f.name}``",
            f"  - {f.metadata['group']}",
            f"  -{default}",
            f"  - {marked(f.metadata['about'])}",
        ]
    return "   .. list-table::\n      :header-rows: 1\n\n" + "\n".join(f"      {row}" for row in rows)


def marked(text: str) -> str:
    """Writes a line in reStructuredText: code, which links to what it names if that is documented, and plain stars."""
    parts = SPAN.split(text)  # every second one is code
    parts[::2] = [STAR.sub(r"\\\g<0>", part) for part in parts[::2]]
    parts[1::2] = [
        f":py:obj:`{c}`" if re.fullmatch(r"[A-Za-z_][\w.]*", c) else f"``{c}``" for c in parts[1::2]
    ]
    return "".join(parts)


def as_restructured_text(app, what, name, value, options, lines: list[str]) -> None:
    """Changes a docstring, line by line, into reStructuredText; examples and sections such as Args: keep their lines.

    A line "name: what it is" that begins or goes on a list of such lines becomes an item, and a list gets room.
    """
    made, section, items, example = [], False, False, False
    if inspect.isclass(value) and described(value):  # the table of `fields` says the rest
        lines[:] = itertools.takewhile(lambda line: not line.lstrip().startswith("Fields"), lines)
    for line in lines:
        text, indented = line.strip(), line.startswith(" ")
        example = (example and bool(text)) or text.startswith(">>>")
        section = SECTION.match(line) is not None or (section and (indented or not text))
        if example or section:
            made.append(line if example else marked(line))
            continue
        begins = bool(text) and not (made and made[-1].strip() and not items)  # a paragraph, or the next item
        item = text.startswith("- ") or (not indented and begins and ITEM.match(text) is not None)
        if item:
            made += [""] * (not items)
            name, _, rest = (
                text.removeprefix("- ").partition(": ") if not text.startswith("- ") else ("", "", text[2:])
            )
            made.append(f"* **{name}**: {marked(rest)}" if name else f"* {marked(rest)}")
        elif items and indented and text:
            made.append(f"  {marked(text)}")
        else:
            made += [""] * (items and bool(text)) + [marked(line)]
        items = item or (items and indented and bool(text))
    lines[:] = made


def skip(app, what, name, value, skip: bool, options) -> bool | None:
    """Leaves out the fields of named tuples that only say which number they have."""
    return True if str(getattr(value, "__doc__", "")).startswith("Alias for field number") else None
