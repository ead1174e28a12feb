"""The wheel is whole: built twice, installed into an empty folder, and used from another one.

What it runs is in tests/notebooks/test_demo.py and test_from_scratch.py."""

import subprocess
import tarfile
import types
import zipfile

import pytest
import shared_runs
from shared_runs import ROOT

from dpnb import folders
from dpnb.training import identity


def content(wheel):
    """{name: bytes} of a wheel."""
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist's names, its wheel, and the wheel of this very tree."""
    folder = tmp_path_factory.mktemp("built")
    with tarfile.open(shared_runs.build("sdist", ROOT, folder / "sdist")) as file:
        file.extractall(folder, filter="data")
        (top,) = {name.split("/")[0] for name in file.getnames()}
        names = {member.name.partition("/")[2] for member in file.getmembers() if member.isfile()}
    of_sdist = shared_runs.build("wheel", folder / top, folder / "again")
    return types.SimpleNamespace(names=names, wheel=shared_runs.installed().wheel, of_sdist=of_sdist)


@pytest.fixture(scope="module")
def installed():
    """A folder with nothing but the wheel, inside a checkout of something else; `dpnb(...)` runs the command."""
    made = shared_runs.installed()

    def dpnb(*arguments, **how):
        return made.dpnb(*arguments, **how).stdout

    return types.SimpleNamespace(site=made.site, run=made.run, dpnb=dpnb)


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
    assert built.wheel.stat().st_size < 16 * 2**20  # of which patches are 12


def test_an_editable_installation_uses_the_checkout(tmp_path):
    made = content(shared_runs.build("editable", ROOT, tmp_path / "editable"))
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
print(site, identity.code(), repr(provenance.git_revision()), folders.runs().absolute(), sep="\\n")
weights.load("wrn-10-2-textures")
"""


@pytest.mark.slow
def test_weights_hash_and_revision(installed, tmp_path):
    """Public weights are there, the code is the same to the bit, and nobody else's revision is taken for ours."""
    said = installed.run(["-c", LOOK], tmp_path).stdout.splitlines()
    assert said == [str(installed.site), identity.code(), "''", str(tmp_path / "runs")]


@pytest.mark.slow
def test_a_record_says_that_its_weights_stayed_out(installed, tmp_path):
    record = installed.site / "dpnb" / "share" / "results" / "cifar10" / "wrn-16-4" / "eps8" / "smoke-seed0"
    said = installed.dpnb("verify", record, "--data-file", tmp_path / "none.npz", cwd=tmp_path, status=3)
    assert "a wheel leaves out ema.safetensors; the weights on record are in the repository" in said
