"""The wheel is whole: built twice, installed into an empty folder, and used from another one."""

import shutil
import subprocess
import sys
import tarfile
import types
import zipfile

import pytest
import shared_runs
from shared_runs import ROOT

from dpnb import folders
from dpnb.training import identity

BUILD = "import sys, hatchling.build; print(getattr(hatchling.build, sys.argv[1])(sys.argv[2]))"


def build(kind, tree, out):
    """The wheel, sdist or editable wheel of a source tree, in a folder of its own."""
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", BUILD, f"build_{kind}", str(out)], cwd=tree, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.strip()


def content(wheel):
    """{name: bytes} of a wheel."""
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist's names, its wheel, and the wheel of this very tree."""
    folder = tmp_path_factory.mktemp("built")
    with tarfile.open(build("sdist", ROOT, folder / "sdist")) as file:
        file.extractall(folder, filter="data")
        (top,) = {name.split("/")[0] for name in file.getnames()}
        names = {member.name.partition("/")[2] for member in file.getmembers() if member.isfile()}
    wheel = build("wheel", ROOT, folder / "wheel")
    return types.SimpleNamespace(
        names=names, wheel=wheel, of_sdist=build("wheel", folder / top, folder / "again")
    )


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A folder with nothing but the wheel, inside a checkout of something else; `dpnb(...)` runs the command."""
    project = tmp_path_factory.mktemp("project")
    site = project / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site]
    subprocess.run([*pip, built.wheel], check=True)
    if shutil.which("git"):
        name = ["-c", "user.name=x", "-c", "user.email=x@x"]
        for arguments in (["init", "-q"], [*name, "commit", "-q", "--allow-empty", "-m", "theirs"]):
            subprocess.run(["git", *arguments], cwd=project, check=True)
    environment = {**shared_runs.environment(), "PYTHONPATH": str(site)}

    def run(command, cwd, status=0):
        done = subprocess.run(
            [sys.executable, *map(str, command)], env=environment, cwd=cwd, capture_output=True, text=True
        )
        assert done.returncode == status, done.stderr
        return done.stdout

    def dpnb(*arguments, cwd, status=0):
        return run([site / "bin" / "dpnb", *arguments], cwd, status)

    return types.SimpleNamespace(site=site, run=run, dpnb=dpnb)


def test_the_sdist_builds_the_same_wheel(built):
    assert content(built.of_sdist) == content(built.wheel)


def test_the_sdist_is_the_repository(built):
    """All that git tracks, and nothing that it ignores."""

    def listed(*options):
        done = subprocess.run(["git", "ls-files", "-z", *options], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            pytest.skip("not a git checkout: which files belong to the repository is not known")
        return {name for name in done.stdout.split("\0") if name and (ROOT / name).exists()}

    assert listed("--cached") <= built.names
    assert built.names - {"PKG-INFO"} <= listed("--cached", "--others", "--exclude-standard")


def test_what_a_wheel_holds(built):
    made = content(built.wheel)
    assert {"dpnb/py.typed", "dpnb/share/constraints.txt"} < set(made)
    assert [name for name in made if name.endswith(".dist-info/licenses/LICENSE")]
    for name in made:
        if name.startswith("dpnb/share/"):
            assert made[name] == (ROOT / name.removeprefix("dpnb/share/")).read_bytes()
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "dpnb").rglob("*.py")}
    assert {name for name in made if name.endswith(".py")} == code
    shared = {name.removeprefix("dpnb/share/") for name in made}
    for pattern in ("notebooks/**/*.ipynb", "results/**/result.json", "results/pretrained/*.safetensors"):
        files = {path.relative_to(ROOT) for path in ROOT.glob(pattern)}
        assert files and {str(path) for path in files if ".ipynb_checkpoints" not in path.parts} <= shared
    assert built.wheel.stat().st_size < 5 * 2**20


def test_an_editable_installation_uses_the_checkout(tmp_path):
    made = content(build("editable", ROOT, tmp_path / "editable"))
    inside = {name for name in made if ".dist-info/" not in name}
    assert inside == {"_dpnb.pth"} and made["_dpnb.pth"] == str(ROOT).encode()
    assert not folders.INSTALLED and folders.ROOT == ROOT


@pytest.mark.slow
def test_what_is_read_without_training(installed, tmp_path):
    assert installed.dpnb("--version", cwd=tmp_path) == f"dpnb {folders.version()}\n"
    assert "run at smoke, teach" in installed.dpnb("list", "cifar10/wrn-16-4/eps8", cwd=tmp_path)
    assert "reached, by our own way" in installed.dpnb("table", "readme", cwd=tmp_path)
    assert "81.4 +- 0.2" in installed.dpnb("table", "cifar10", cwd=tmp_path)
    assert installed.dpnb("table", "digits", cwd=tmp_path) == ""
    assert not list(tmp_path.iterdir())


def test_notebooks_are_copied(installed, tmp_path):
    count = len([*(installed.site / "dpnb" / "share" / "notebooks").rglob("*.ipynb")])
    assert installed.dpnb("notebooks", "nb", cwd=tmp_path) == f"notebooks copied to nb: {count}\n"
    lecture, table = tmp_path / "nb" / "learn" / "05_audit.ipynb", tmp_path / "nb" / "cifar10_table.ipynb"
    table.write_text("mine")
    lecture.unlink()
    said = installed.dpnb("notebooks", "nb", cwd=tmp_path)
    assert said.startswith("notebooks copied to nb: 1\nleft alone") and "nb/cifar10_table.ipynb" in said
    assert table.read_text() == "mine"
    assert lecture.read_bytes() == (ROOT / "notebooks" / "learn" / lecture.name).read_bytes()


LOOK = """
import pathlib, dpnb
from dpnb import folders
from dpnb.models import weights
from dpnb.results import provenance
from dpnb.training import identity
site = pathlib.Path(dpnb.__file__).parents[1]
print(site, identity.code(), repr(provenance.git_revision()), folders.RUNS.absolute(), sep="\\n")
weights.load("wrn-10-2-textures")
"""


@pytest.mark.slow
def test_weights_hash_and_revision(installed, tmp_path):
    """Public weights are there, the code is the same to the bit, and nobody else's revision is taken for ours."""
    said = installed.run(["-c", LOOK], tmp_path).splitlines()
    assert said == [str(installed.site), identity.code(), "''", str(tmp_path / "runs")]


@pytest.mark.slow
def test_a_record_says_that_its_weights_stayed_out(installed, tmp_path):
    record = installed.site / "dpnb" / "share" / "results" / "cifar10" / "wrn-16-4" / "eps8" / "smoke-seed0"
    said = installed.dpnb("verify", record, "--data-file", tmp_path / "none.npz", cwd=tmp_path, status=3)
    assert "a wheel leaves out ema.safetensors; the weights on record are in the repository" in said


@pytest.mark.notebook
def test_a_run(installed, tmp_path):
    """Three updates through the notebook; all that is written lies in the working directory."""
    before = {path for path in installed.site.rglob("*") if "__pycache__" not in path.parts}
    sets = [f"--set={pair}" for pair in shared_runs.SMALL]
    said = installed.dpnb("run", "digits/wrn-10-1", *sets, cwd=tmp_path)
    (record,) = tmp_path.rglob("result.json")
    assert record.parts[len(tmp_path.parts)] == "runs" and str(record.relative_to(tmp_path)) in said
    assert {path for path in installed.site.rglob("*") if "__pycache__" not in path.parts} == before
