"""A lecture in JupyterLab, in a browser: it runs, a slider redraws, and no cell's picture is lost in the file that is saved.

Needs the extras `lab` and `browser`, and the system's chromium.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import types
import urllib.request

import nbformat
import pytest
import shared_runs

pytestmark = [pytest.mark.notebook, pytest.mark.slow]

LECTURE = "02_spending_a_budget.ipynb"
PACKAGES = "playwright", "jupyterlab", "ipywidgets"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Of the user interface: all cells are drawn, not only those in view, and nobody is asked about news.
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
EXECUTED = shared_runs.ROOT / "results" / "notebooks" / "learn" / LECTURE  # by papermill

# The code cells of the open notebook: whether each is done, its errors and pictures, and whether the kernel rests.
STATE = """() => {
    const panel = window.jupyterapp?.shell.currentWidget
    const cells = (panel?.content?.widgets ?? []).filter(cell => cell.model.type === "code")
    const outputs = cells.flatMap(cell => cell.model.outputs.toJSON())
    return {
        status: panel?.sessionContext?.session?.kernel?.status,
        cells: cells.length,
        waiting: cells.filter(cell => !cell.model.executionCount).length,
        errors: outputs.filter(o => o.output_type === "error").map(o => o.ename + ": " + o.evalue),
        pictures: cells.map(cell => cell.node.querySelectorAll(".jp-RenderedImage img, .jp-RenderedSVG").length),
        unsaved: panel?.context?.model.dirty,
    }
}"""


@pytest.fixture
def lab(tmp_path):
    """A JupyterLab on a copy of the lecture: its address, and the copy. No settings of the user's count."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    missing += [] if CHROMIUM else ["chromium"]
    if missing:
        pytest.skip(f"not installed here: {', '.join(missing)}; no lecture is opened in a browser")
    folder, own = tmp_path / "work", tmp_path / "jupyter"
    folder.mkdir()
    for name, values in SETTINGS.items():
        file = own / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    lecture = shutil.copy(shared_runs.NOTEBOOK.parent / "learn" / LECTURE, folder)
    kinds = "CONFIG", "DATA", "RUNTIME"
    environment = {
        **shared_runs.environment(),
        **{f"JUPYTER_{kind}_DIR": str(own / kind.lower()) for kind in kinds},
        "JUPYTERLAB_SETTINGS_DIR": str(own / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(own / "workspaces"),
    }
    port, log = shared_runs.free_port(), tmp_path / "jupyter.log"
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--ServerApp.ip=127.0.0.1", f"--port={port}",
        "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--expose-app-in-browser",
        *(["--allow-root"] if hasattr(os, "getuid") and os.getuid() == 0 else []),
    ]  # fmt: skip
    with open(log, "wb") as stream:
        server = subprocess.Popen(
            command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream
        )
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 120
        while not answers(f"{address}/api"):
            assert server.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.2)
        yield types.SimpleNamespace(address=f"{address}/lab/tree/{LECTURE}", file=lecture)
    finally:
        server.terminate()  # which ends its kernels first
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def answers(address: str) -> bool:
    """Returns whether a server is there."""
    with contextlib.suppress(OSError):
        urllib.request.urlopen(address, timeout=5).close()
        return True
    return False


@pytest.fixture
def page(lab):
    """The lecture, open in a browser that nobody sees."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, headless=True, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        try:
            page = browser.new_page(viewport={"width": 1280, "height": 1600})
            page.set_default_timeout(60_000)
            page.goto(lab.address)
            yield page
        finally:
            browser.close()


def until(page, done, seconds: float) -> dict:
    """The state of the notebook, as soon as `done` holds of it."""
    end = time.monotonic() + seconds
    while not done(state := page.evaluate(STATE)):
        assert time.monotonic() < end, f"still so after {seconds:g} s: {state}"
        page.wait_for_timeout(200)
    return state


def run_all(page) -> dict:
    """Chooses Run All Cells in the menu: the state when all cells have run, or one has failed."""
    until(page, lambda now: now["cells"] and now["status"] == "idle", 120)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.locator(".lm-Menu-item[data-command='runmenu:run-all']").click()
    done = lambda now: now["status"] == "idle" and (not now["waiting"] or now["errors"])
    return until(page, done, 600)


def move_first_slider(page) -> None:
    """Moves the first slider two steps with the keyboard: a picture comes below it, and then another one."""
    output = page.locator(".jp-Cell-outputArea .jp-OutputArea-child:has(.widget-slider)").first
    slider, picture = output.locator(".widget-slider").first, output.locator(".widget-output img")
    assert not picture.count()
    value, seen = slider.inner_text(), []
    for _ in range(2):
        slider.locator(".noUi-handle").press("ArrowRight")
        end = time.monotonic() + 60
        while not (now := picture.evaluate_all("images => images.map(img => img.src)")) or now[0] in seen:
            assert time.monotonic() < end, "the slider was moved, and no new picture is below it"
            page.wait_for_timeout(100)
        seen += now
    assert slider.inner_text() != value and "σ" in slider.inner_text()


def pictures_of(file) -> list[int]:
    """The number of pictures in the outputs of each code cell of a notebook's file."""
    cells = [cell for cell in nbformat.read(file, 4).cells if cell.cell_type == "code"]
    return [
        sum(bool({"image/png", "image/svg+xml"} & {*o.get("data", ())}) for o in c.outputs) for c in cells
    ]


def test_a_lecture_with_its_sliders(lab, page):
    """All cells run; a slider redraws its picture; and each cell that shows pictures on the screen has one in the file."""
    assert not run_all(page)["errors"]
    move_first_slider(page)
    shown = page.evaluate(STATE)["pictures"]
    page.keyboard.press("Control+s")
    until(page, lambda now: not now["unsaved"], 60)
    cells = [cell for cell in nbformat.read(lab.file, 4).cells if cell.cell_type == "code"]
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error"]
    assert all(cell.execution_count for cell in cells)
    saved = pictures_of(lab.file)
    exploring = [i for i, cell in enumerate(cells) if "\nexplore(" in cell.source]
    assert len(exploring) == 3 and all(shown[i] for i in exploring)
    assert [
        i for i, number in enumerate(shown) if number and not saved[i]
    ] == []  # code cells whose picture is lost
    # As many as papermill leaves, which has no sliders.
    assert sum(saved) >= sum(pictures_of(EXECUTED)) > 5
