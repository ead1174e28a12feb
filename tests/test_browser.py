"""A lecture in JupyterLab, in a browser: it runs, its sliders move, and its pictures are in the file that is saved.

Needs the packages of the extra `browser` and Debian's chromium; it is skipped, and says why, where they are absent.
"""

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest
import shared_runs

LECTURE = "02_spending_a_budget.ipynb"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [
    name for name in ("playwright", "jupyterlab", "ipywidgets") if importlib.util.find_spec(name) is None
]
MISSING += ["chromium"] * (CHROMIUM is None)
MINUTE = 60_000  # of a browser, in milliseconds
# Every code cell has its number (those that are folded show none), none waits, and the sliders are there.
ALL_RAN = r"""() => {
    const prompts = [...document.querySelectorAll(".jp-CodeCell .jp-InputPrompt")].map(e => e.textContent.trim());
    const ran = prompts.filter(p => /^\[\d+\]/.test(p)).length;
    return ran > 20 && prompts.every(p => p === "" || /^\[\d+\]/.test(p)) && !!document.querySelector(".widget-slider");
}"""


pytestmark = [
    pytest.mark.notebook,
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}"),
]


@pytest.fixture
def lab(tmp_path):
    """The address of a JupyterLab of its own on a folder with the lecture, and the file."""
    shutil.copy(shared_runs.NOTEBOOK.parent / "learn" / LECTURE, tmp_path)
    port = shared_runs.free_port()
    home = {
        f"JUPYTER_{name}_DIR": str(shared_runs.temporary("lab")) for name in ("CONFIG", "DATA", "RUNTIME")
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--IdentityProvider.token=",
               "--ServerApp.password=", "--expose-app-in-browser", f"--ServerApp.root_dir={tmp_path}"]  # fmt: skip
    environment = {
        **shared_runs.environment(),
        **shared_runs.OPTIMISED,
        **home,
        "JUPYTER_PREFER_ENV_PATH": "1",
    }
    server = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            assert server.poll() is None, "JupyterLab did not start"
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/api", timeout=5).close()
                break
            time.sleep(0.2)
        yield address, tmp_path / LECTURE
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def outputs_of(notebook):
    return [o for cell in notebook.cells for o in cell.get("outputs", ())]


def test_sliders_move_and_pictures_are_saved(lab):
    from playwright.sync_api import sync_playwright

    address, file = lab
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            page = browser.new_page(viewport={"width": 1280, "height": 1600})
            page.goto(f"{address}/lab/tree/{LECTURE}?reset", timeout=MINUTE)
            page.wait_for_selector("text=/\\| Idle/", timeout=MINUTE)  # in the status bar: a kernel is there
            page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells'), null")
            page.wait_for_function(ALL_RAN, timeout=5 * MINUTE)
            slider = page.locator(".widget-slider").first
            box = page.locator(".jp-OutputArea-output:has(.widget-slider)").first
            picture = box.locator("img").first
            picture.wait_for(timeout=MINUTE)
            before = picture.get_attribute("src")
            slider.locator(".noUi-handle").press("ArrowRight")
            box.locator(f'img:not([src="{before}"])').first.wait_for(timeout=MINUTE)
            page.evaluate("window.jupyterapp.commands.execute('docmanager:save').then(() => null)")
        finally:
            browser.close()
    saved = nbformat.read(file, 4)
    assert not [o for o in outputs_of(saved) if o.output_type == "error"]
    assert all(cell.execution_count for cell in saved.cells if cell.cell_type == "code")
    exploring = [cell for cell in saved.cells if cell.cell_type == "code" and "\nexplore(" in cell.source]
    assert len(exploring) == 3
    for cell in exploring:
        assert any("image/png" in o.get("data", {}) for o in cell.outputs)
        assert any("application/vnd.jupyter.widget-view+json" in o.get("data", {}) for o in cell.outputs)
    alone = nbformat.read(shared_runs.ROOT / "results" / "notebooks" / "learn" / LECTURE, 4)  # by papermill
    pictures = [sum("image/png" in o.get("data", {}) for o in outputs_of(n)) for n in (saved, alone)]
    assert pictures[0] == pictures[1] > 5
