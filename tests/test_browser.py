"""The playground in a real browser: JupyterLab runs notebook 08, and a person types, presses and reads.

Needs the Python package playwright and a Chromium; skipped where either is missing. Nothing committed is touched: the
notebooks are copied, figures go elsewhere. Screenshots go to the folder that SCREENSHOTS names, if it does.
"""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from helpers.config import FIGURES, ROOT
from helpers.models import DEFAULT
from helpers.widgets import STILL_BUSY

playwright = pytest.importorskip(
    "playwright.sync_api", reason="the Python package playwright is not installed: pip install playwright"
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the path (chromium, google-chrome)")

ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
STARTUP = """
from pathlib import Path
from helpers import config
config.FIGURES = Path({figures!r})
"""
QUIET = {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}
# What a button says, now and after every change, in window.states.
WATCH = """(panel, label) => {
    const button = [...panel.querySelectorAll('button')].find(each => each.textContent === label);
    window.states = [label];
    new MutationObserver(() => window.states.at(-1) === button.textContent || window.states.push(button.textContent))
        .observe(button, {childList: true, characterData: true, subtree: true});
}"""
# Every code cell has a number, or one of them an error.
DONE = """() => {
    const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')];
    return prompts.length && prompts.every(each => /\\d/.test(each.textContent))
        || document.querySelector("[data-mime-type='application/vnd.jupyter.error']");
}"""
MINUTES = 60_000  # milliseconds
THEME = "JupyterLab Dark" if os.environ.get("DARK") else "JupyterLab Light"  # for screenshots


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a JupyterLab that shows a copy of the notebooks, stopped afterwards."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    figures = folder / "figures"
    (figures / DEFAULT).mkdir(parents=True)
    shutil.copy(FIGURES / DEFAULT / "01_choices.csv", figures / DEFAULT)
    _write(folder / "ipython/profile_default/startup/00_test.py", STARTUP.format(figures=str(figures)))
    settings = folder / "settings/@jupyterlab/apputils-extension"
    of_notebooks = folder / "settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings"
    _write(of_notebooks, json.dumps({"autoStartDefaultKernel": True}))
    _write(settings / "notification.jupyterlab-settings", json.dumps(QUIET))
    _write(settings / "themes.jupyterlab-settings", json.dumps({"theme": THEME}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    own = {"IPYTHONDIR": "ipython", "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}
    own |= {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime"}
    environment = os.environ | {name: str(folder / place) for name, place in own.items()}
    environment |= {"MODEL": DEFAULT, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"]
    command += [f"--ServerApp.root_dir={folder / 'notebooks'}"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
        try:
            _wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", server, folder / "log")
            yield f"http://127.0.0.1:{port}/lab/tree/08_playground.ipynb?token={token}"
        finally:
            server.terminate()  # ends its kernels
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as drive:
        opened = drive.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        try:
            yield opened
        finally:
            opened.close()


@pytest.fixture(scope="module")
def page(lab: str, browser: "playwright.Browser", tmp_path_factory: pytest.TempPathFactory) -> "playwright.Page":
    """Notebook 08 in JupyterLab, all cells run."""
    page = browser.new_page(viewport={"width": 1400, "height": 1100})
    page.goto(lab)
    page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=2 * MINUTES)
    page.get_by_text("| Idle").wait_for(timeout=MINUTES)  # what runs before the kernel is connected has no widgets
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.locator(".jp-CodeCell .jp-InputArea-prompt", has_text="*").first.wait_for()
    try:
        page.wait_for_function(DONE, timeout=3 * MINUTES)
    except playwright.TimeoutError:
        _picture(page, "unfinished", Path(os.environ.get("SCREENSHOTS") or tmp_path_factory.mktemp("shots")))
        raise
    return page


@pytest.fixture
def look(page: "playwright.Page", tmp_path: Path) -> Callable[[str], None]:
    """Take a picture of what can be seen now."""
    return lambda name: _picture(page, name, Path(os.environ.get("SCREENSHOTS") or tmp_path))


def test_every_cell_ran(page: "playwright.Page", look: Callable):
    look("opened")
    assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    assert page.locator(".jp-OutputArea-output", has_text="Traceback").count() == 0


def test_a_text_is_read_token_by_token_and_the_depth_redraws_it(page: "playwright.Page", look: Callable):
    panel = _panel(page, "Read")
    panel.get_by_label("text").fill("He heard the wolves behind the door.")
    _press(panel, "Read")
    tokens = panel.locator("span[title^='afraid:']")
    assert "".join(tokens.all_inner_texts()) == "He heard the wolves behind the door."
    look("a_read")
    before = [each.get_attribute("title") for each in tokens.all()]
    panel.get_by_label("depth").fill("2")
    page.keyboard.press("Enter")
    panel.get_by_text("At depth 2").wait_for()
    page.wait_for_timeout(500)  # the code follows the text
    assert [each.get_attribute("title") for each in tokens.all()] != before
    assert "depth=2" in _code(panel)
    look("a_redrawn")
    slider = panel.get_by_role("slider")
    slider.hover()
    page.mouse.down()
    page.mouse.move(2000, 0)
    page.mouse.up()
    panel.get_by_text("At depth 2").wait_for(state="detached")


def test_pairs_give_a_direction_with_its_check(page: "playwright.Page", look: Callable):
    panel = _panel(page, "Find direction")
    _press(panel, "Find direction")
    panel.get_by_role("img").wait_for()
    assert panel.get_by_text("my direction, held out").is_visible()
    look("b_direction")


def test_a_prompt_is_continued_otherwise_when_steered(page: "playwright.Page", look: Callable):
    panel = _panel(page, "Continue")
    panel.get_by_label("prompt").fill("The old man looked at the sea, and")
    _press(panel, "Continue")
    unsteered, steered = (text.split("\n", 1)[1] for text in _columns(panel))
    assert unsteered.startswith("The old man looked at the sea, and ")
    assert steered.startswith("The old man looked at the sea, and ")
    assert unsteered != steered
    assert panel.locator("mark").count() > 0
    assert _code(panel).startswith("play.steer('The old man looked at the sea, and', direction='afraid', ")
    look("c_steered")


def test_a_feature_shows_its_passages(page: "playwright.Page", look: Callable):
    panel = _panel(page, "Find features")
    _press(panel, "Find features")
    feature = panel.get_by_role("button", name=" · ").nth(4)
    number = feature.inner_text().split(" · ")[0]
    panel.evaluate(WATCH, "Find features")
    feature.click()
    _wait(page)
    assert panel.get_by_text(f"feature {number}: strongest passages").is_visible()
    assert _code(panel).startswith(f"play.passages({number}, depth=")
    look("d_feature")


@pytest.mark.parametrize(
    ("button", "label", "value", "said"),
    [
        ("Read", "text", "  ", "the text is empty"),
        ("Find direction", "pairs", "no separator\na | b", "line 1 has 0 separators"),
        ("Continue", "prompt", "", "the prompt is empty"),
        ("Find features", "text", "word " * 300, "leave out at least"),
    ],
)
def test_a_mistake_is_told_as_a_sentence_and_the_next_press_works(
    page: "playwright.Page", look: Callable, button: str, label: str, value: str, said: str
):
    panel = _panel(page, button)
    box = panel.get_by_label(label, exact=True)
    good = box.input_value()
    box.fill(value)
    _press(panel, button)
    alert = panel.get_by_role("alert")
    alert.wait_for()
    assert said in alert.inner_text()
    look(f"mistake_{button.lower().replace(' ', '_')}")
    box.fill(good)
    _press(panel, button)
    assert alert.count() == 0
    assert _code(panel)


def test_a_prompt_is_typed_and_continued_by_keyboard_alone(page: "playwright.Page", look: Callable):
    panel = _panel(page, "Continue")
    panel.get_by_label("prompt").focus()
    page.keyboard.press("Control+a")
    page.keyboard.type("It was late when the doctor")
    for _ in range(12):  # over the other controls
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "Continue":
            break
    panel.evaluate(WATCH, "Continue")
    page.keyboard.press("Enter")
    _wait(page)
    assert panel.get_by_text("It was late when the doctor").count() > 0
    look("keyboard")
    assert _code(panel).startswith("play.steer('It was late when the doctor'")
    page.keyboard.press("Tab")
    page.keyboard.press("Control+a")  # in the code, not over the cells
    assert page.evaluate("document.activeElement.value.slice(document.activeElement.selectionStart)") == _code(panel)
    prompt = panel.get_by_label("prompt")
    prompt.focus()
    prompt.fill("At dawn the ship")
    panel.evaluate(WATCH, "Continue")
    page.keyboard.press("Enter")
    _wait(page)
    assert "At dawn the ship" in _code(panel)


def test_a_second_press_while_busy_does_nothing(page: "playwright.Page"):
    panel = _panel(page, "Continue")
    panel.get_by_label("prompt").fill("The clock struck, and")
    panel.evaluate(WATCH, "Continue")
    panel.get_by_role("button", name="Continue", exact=True).dblclick()
    panel.get_by_text("The clock struck, and").first.wait_for()
    page.wait_for_timeout(2000)  # in which a second run would begin
    assert page.evaluate("window.states") == ["Continue", "working ...", "Continue"]


def _picture(page: "playwright.Page", name: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png")


def _panel(page: "playwright.Page", button: str) -> "playwright.Locator":
    """The panel with this button, in view."""
    found = page.locator(".jp-OutputArea-output > .lm-Widget.widget-vbox, .jp-OutputArea-output .widget-vbox").filter(
        has=page.get_by_role("button", name=re.compile(f"^({button}|working ...)$"))
    )
    panel = found.first
    panel.scroll_into_view_if_needed()
    panel.evaluate("panel => panel.scrollIntoView({block: 'start'})")
    return panel


def _press(panel: "playwright.Locator", button: str) -> None:
    """Press a button and wait until it has worked and can be pressed again."""
    panel.evaluate(WATCH, button)
    panel.get_by_role("button", name=button, exact=True).click()
    _wait(panel.page)


def _wait(page: "playwright.Page") -> None:
    """Wait until the button that is watched has worked, and until a press counts as one of its own."""
    page.wait_for_function("window.states.length === 3", timeout=MINUTES)
    page.wait_for_timeout(2000 * STILL_BUSY)


def _columns(panel: "playwright.Locator") -> list[str]:
    """The texts that stand beside each other."""
    return panel.locator("div[style*='flex-wrap'] > div").all_inner_texts()


def _code(panel: "playwright.Locator") -> str:
    return panel.get_by_label("as code").input_value()


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(240):
        try:
            urlopen(address, timeout=5).close()
            return
        except (URLError, OSError):
            if server.poll() is not None:
                break
            time.sleep(0.25)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()}")
