"""The probe in SimpleTuner's WebUI: its real server, its page in headless Chromium, a job started from there."""

from __future__ import annotations

import base64
import json
import mimetypes
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chromium
import httpx
import psutil
import pytest
from chromium import PATIENCE
from kept_files import artefact
from real import TESTS
from test_real_cli import ENVIRONMENT
from test_real_run import RUN, run_of, set_options

from simpletuner_layerprobe.training.options import OPTIONS

PASSWORD = "probe-probe-1"
SAMPLES = 3
# What the page loads from the net, by the npm package that has it.
PACKAGES = (
    "htmx.org@2",
    "alpinejs@3",
    "@alpinejs/collapse@3",
    "bootstrap@5",
    "js-yaml@4",
    "markdown-it@14",
    "dompurify@3",
    "@fortawesome/fontawesome-free@7",
)


class Server:
    """`simpletuner server` in a folder of its own, with a first user who has answered the first questions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        home = folder / "home"
        home.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "server.log"
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(TESTS / "webui_server.py"), "server", "--host=127.0.0.1", f"--port={port}"],
                cwd=folder,
                env=ENVIRONMENT
                | {
                    "HOME": str(home),
                    "SIMPLETUNER_WEB_UI_CONFIG": str(home / "webui"),
                    "SIMPLETUNER_STATE_DIR": str(home / "state"),
                    "SIMPLETUNER_CONFIG_DIR": str(folder / "config"),
                },
                stdout=log,
                stderr=log,
            )
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE)
        self.descendants: set[psutil.Process] = set()

    def set_up(self) -> None:
        """Raises RuntimeError if the server does not come up."""
        end = time.monotonic() + PATIENCE
        while True:
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not start: {self.log.read_text(errors='replace')[-2000:]}")
            try:
                if self.client.get("/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.3)
        self._post(
            "/api/auth/setup/first-admin",
            {"email": "probe@example.com", "username": "probe", "password": PASSWORD},
        )
        answers: dict[str, object] = {
            "default_configs_dir": str(self.folder / "config"),
            "default_output_dir": str(self.folder / "output"),
            "default_datasets_dir": str(self.folder),
            "accelerate_defaults": {"mode": "disabled", "device_ids": [], "manual_count": 1},
        }
        for step, value in answers.items():
            self._post(f"/api/webui/onboarding/steps/{step}", {"value": value})
        self._post("/api/configs/tiny-probe/activate", {})

    def _post(self, path: str, body: dict[str, object]) -> None:
        answer = self.client.post(path, json=body)
        assert answer.status_code == 200, (path, answer.text)

    def status(self) -> str:
        self.descendants |= set(psutil.Process(self._process.pid).children(recursive=True))
        status: str = self.client.get("/api/training/status").json()["status"]
        return status

    def wait_for(self, status: str) -> None:
        end = time.monotonic() + PATIENCE
        while (found := self.status()) != status:
            assert found not in ("failed", "error") and time.monotonic() < end, (
                found,
                self.log.read_text(errors="replace")[-4000:],
            )
            time.sleep(0.5)

    def close(self) -> None:
        """Raises AssertionError if a process is left over."""
        self.client.close()
        if self._process.poll() is None:
            self.descendants |= set(psutil.Process(self._process.pid).children(recursive=True))
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _, left = psutil.wait_procs(self.descendants, timeout=PATIENCE)
        for process in left:
            process.kill()
        assert not left


@pytest.fixture(scope="module")
def server(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("webui") / "tiny"
    shutil.copytree(tiny_sd3, folder)
    # The WebUI takes no resolution below 256 in this place; the data backend's own, 128, is what counts.
    set_options(folder, resolution=256, layerprobe=False, layerprobe_samples="auto")
    server = Server(folder)
    try:
        try:
            server.set_up()
        except RuntimeError as error:
            pytest.skip(str(error))
        yield server
    finally:
        server.close()


def config_of(server: Server) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((server.folder / "config" / "tiny-probe" / "config.json").read_text())
    return config


def test_the_api_serves_saves_and_keeps_the_options(server):
    tab = server.client.get("/api/fields/tabs/training").json()
    assert [one["title"] for one in tab["sections"] if one["id"] == "layer_probe"] == ["Layer Probe"]
    for option in OPTIONS:
        field = server.client.get(f"/api/fields/field/{option.name}").json()
        assert (field["ui_label"], field["help_text"]) == (option.label, option.help)
        values = [one["value"] for one in field.get("choices") or []]
        assert values == [value for value, _ in option.choices]
    # As the page's form sends it: all as text, and a box that is not ticked not at all.
    answer = server.client.post(
        "/api/training/config",
        data={"layerprobe_sigmas": "training", "layerprobe_flush_seconds": "0.5", "preserve_defaults": "true"},
    )
    assert "Configuration saved" in answer.text
    config = config_of(server)
    assert config["layerprobe_sigmas"] == "training" and float(config["layerprobe_flush_seconds"]) == 0.5
    assert "layerprobe_stop_when_stable" not in config  # it has its default
    assert config["model_family"] == "sd3"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[str, bytes] | None]:
    """The scripts and styles that the page loads from the net, from npm's packages of the same names."""
    try:
        httpx.head("https://unpkg.com", timeout=5)
        return lambda url: None
    except httpx.TransportError:
        pass
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("SimpleTuner's page loads its scripts from the net; here is none, and no npm to fetch them with")
    folder = tmp_path_factory.mktemp("npm")
    command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder), *PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    if done.returncode:
        pytest.skip(f"SimpleTuner's page loads its scripts from the net; here is none, and npm says: {done.stderr}")

    def of(url: str) -> tuple[str, bytes] | None:
        package = re.match(r"https://(?:cdn\.jsdelivr\.net/npm|unpkg\.com)/(@?[^@]+)@[^/]+/(.+)", url)
        fonts = re.match(r"https://cdnjs\.cloudflare\.com/ajax/libs/font-awesome/[^/]+/(.+)", url)
        if package is None and fonts is None:
            return None
        name, part = package.groups() if package else ("@fortawesome/fontawesome-free", fonts[1])
        path = folder / "node_modules" / name / part
        return mimetypes.guess_type(path.name)[0] or "application/octet-stream", path.read_bytes()

    return of


@pytest.fixture
def page(server, files, tmp_path) -> Iterator[chromium.Page]:
    with chromium.Page(tmp_path / "profile") as page:
        page.serve("https://*", files)
        for name, value in server.client.cookies.items():
            page.call("Network.setCookie", name=name, value=value, url=server.url)
        yield page


def open_section(page: chromium.Page, server: Server, width: int, height: int) -> None:
    """The training tab in full, at the probe's section."""
    page.open(f"{server.url}/web/trainer#training", width=width, height=height)
    page.wait_for(
        "window.Alpine?.store('trainer')?.activeEnvironmentConfig?.['--model_family'] || "
        "window.Alpine?.store('trainer')?.activeEnvironmentConfig?.model_family"
    )
    page.wait_for("document.querySelector('#section-layer_probe')")
    page.value("document.querySelector('#tab-content .hero-dismiss-btn')?.click()")
    page.wait_for("document.querySelector('#section-layer_probe').offsetHeight > 100")
    # The log at the bottom covers the form.
    page.value("document.querySelector('#section-layer_probe').scrollIntoView({block: 'center'})")


def press_button(page: chromium.Page, selector: str) -> None:
    """A real click, once nothing lies over the button any more."""
    middle = f"(r => [r.x + r.width / 2, r.y + r.height / 2])({selector}.getBoundingClientRect())"
    page.wait_for(f"{selector} && {selector}.contains(document.elementFromPoint(...{middle}))")
    x, y = page.value(middle)
    page.point(x, y)
    page.click(x, y)


def picture(page: chromium.Page, name: str) -> Path:
    """What the window shows, as a PNG."""
    path = artefact(name)
    path.write_bytes(base64.b64decode(page.call("Page.captureScreenshot", format="png")["data"]))
    return path


def type_into(page: chromium.Page, name: str, text: str) -> None:
    page.value(
        f"(() => {{ const e = document.querySelector('#{name}'); e.scrollIntoView({{block: 'center'}}); "
        f"e.focus(); e.select() }})()"
    )
    page.call("Input.insertText", text=text)
    page.value(f"document.querySelector('#{name}').dispatchEvent(new Event('change', {{bubbles: true}}))")


ENTERED = {
    "layerprobe": "True",
    "layerprobe_sigmas": "uniform",
    "layerprobe_samples": str(SAMPLES),
    "layerprobe_stop_when_stable": "0.95",
}


def enter_and_save(page: chromium.Page, server: Server) -> None:
    page.value("document.querySelector('#layerprobe').checked || document.querySelector('#layerprobe').click()")
    page.value(
        "(() => { const e = document.querySelector('#layerprobe_sigmas'); e.value = 'uniform'; "
        "e.dispatchEvent(new Event('change', {bubbles: true})) })()"
    )
    for name in ("layerprobe_samples", "layerprobe_stop_when_stable"):
        type_into(page, name, ENTERED[name])
    before = config_of(server)
    page.wait_for(f"!{button('Save')}.disabled")
    press_button(page, button("Save"))
    page.wait_for(button("Save Configuration"))
    press_button(page, button("Save Configuration"))
    end = time.monotonic() + PATIENCE
    while config_of(server) == before:
        assert time.monotonic() < end, picture(page, "webui-not-saved.png")
        page.value("1")
        time.sleep(0.1)


def button(text: str) -> str:
    return f"[...document.querySelectorAll('button')].find(b => b.innerText.trim() == '{text}' && b.offsetParent)"


@pytest.mark.skipif(chromium.found() is None, reason="no Chromium on PATH")
def test_the_page_shows_sets_and_saves_the_options_and_starts_a_job(server, page):
    open_section(page, server, 390, 844)
    assert page.value("document.querySelector('#section-layer_probe').scrollWidth") <= 390
    picture(page, "webui-phone.png")
    open_section(page, server, 1280, 1000)
    shown = page.value(
        "[...document.querySelectorAll('#section-layer_probe [data-field-name]')].map(e => [e.dataset.fieldName, "
        "e.querySelector('label').innerText.trim(), e.querySelector('[aria-label]').getAttribute('aria-label')])"
    )
    assert shown == [[option.name, option.label, option.help] for option in OPTIONS]
    assert "Layer Probe".upper() in page.value("document.querySelector('#section-layer_probe h6').innerText").upper()
    assert page.value(
        "[...document.querySelectorAll('#layerprobe_sigmas option')].map(e => e.value).filter(v => v)"
    ) == ["uniform", "stratified", "training"]

    end = time.monotonic() + PATIENCE
    while {name: str(config_of(server).get(name)) for name in ENTERED} != ENTERED:
        assert time.monotonic() < end, picture(page, "webui-not-saved.png")
        enter_and_save(page, server)  # on a busy machine the page may still put its old values over these
    for name in ("layerprobe_samples", "layerprobe_stop_when_stable", "layerprobe_flush_seconds"):
        assert page.value(f"document.querySelector('#{name}').checkValidity()"), name
    page.value("document.querySelector('#section-layer_probe').scrollIntoView({block: 'center'})")
    picture(page, "webui-section.png")

    end = time.monotonic() + PATIENCE
    pressed = 0.0
    while server.status() == "idle":
        assert time.monotonic() < end, picture(page, "webui-not-started.png")
        if time.monotonic() > pressed + 30:  # the page takes no notice of it while it still saves
            press_button(page, "document.querySelector('#runBtn')")
            pressed = time.monotonic()
        page.value("1")
        time.sleep(0.2)
    picture(page, "webui-running.png")
    assert not [line for line in page.problems if "layerprobe" in line]


def test_a_job_of_the_webui_writes_the_run(server):
    """The one that the page started; where there is no Chromium, the same one started as the page does it."""
    if server.status() == "idle":
        form = {
            "layerprobe": "true",
            "layerprobe_sigmas": "uniform",
            "layerprobe_samples": str(SAMPLES),
            "layerprobe_stop_when_stable": "0.95",
        }
        server.client.post("/api/training/config", data=form)
        answer = server.client.post("/api/training/start", data={})
        assert "Training Starting" in answer.text
    server.wait_for("completed")
    run = run_of(server.folder)
    assert run.samples == SAMPLES and run.manifest.settings["sigmas"] == "uniform"
    assert (server.folder / RUN / "config.json").exists()
    assert not list((server.folder / "output").rglob("*lora*.safetensors"))
