"""The web page in a real browser: a picture is given, a question asked, the answer streams, its boxes are drawn."""

import io
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from threading import Event

import pytest
from PIL import Image
from stub_server import END, stub_server

pytest.importorskip("selenium", reason="selenium is not installed")
pytest.importorskip("gradio", reason="gradio is not installed")
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="neither chromium nor its driver is installed")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def stub():
    with stub_server() as stub:
        yield stub


@pytest.fixture(scope="module")
def site(stub, tmp_path_factory):
    """The address of the page, which the command serves in a process of its own."""
    command = [sys.executable, "-m", "megatron_sphinx", "demo", "--server", stub.url, "--port", "0", "--api-key", "k1"]
    folder = tmp_path_factory.mktemp("page")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    line = child.stdout.readline()
    yield re.search(r"http://127\.0\.0\.1:\d+", line)[0]
    child.terminate()
    child.stdout.close()
    assert child.wait(timeout=20) == 0
    assert not list(folder.glob("sphinx-page-*"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for word in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1280,900",
                 f"user-data-dir={profile}"):  # fmt: skip
        options.add_argument(f"--{word}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def test_a_picture_is_asked_about_and_boxes_are_drawn(browser, site, stub, tmp_path):
    def find(selector):
        return browser.find_element(By.CSS_SELECTOR, selector)

    def until(condition, seconds=15):
        return WebDriverWait(browser, seconds, 0.05).until(lambda _: condition())

    def chat():
        return find("#chat").text

    def ask(question):
        find("#question textarea").send_keys(question)
        find("#submit").click()

    def shows(selector):
        return browser.find_elements(By.CSS_SELECTOR, selector)

    def fetched():
        return browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")

    picture = tmp_path / "picture.png"
    Image.new("RGB", (300, 200), (250, 250, 240)).save(picture)
    browser.get(site)
    until(lambda: shows("#picture input[type=file]"))
    find("#picture input[type=file]").send_keys(str(picture))
    until(lambda: shows("#picture img") and any("/queue/data" in name for name in fetched()))  # which clears the chat

    go_on = Event()
    first, second = "a cup[0.1,0.2,0.5,0.7]", " <b>and</b> ![x](http://127.0.0.1:9/x.png) *two* eyes[0.5,0.5]"
    boxes = [{"box": [30, 20, 150, 120], "begin": 5, "end": 22},
             {"point": [200, 100], "begin": len(first + second) - 9, "end": len(first + second)}]  # fmt: skip
    stub.script = [first, go_on, second, {"delta": {"boxes": boxes}, **END}]
    ask("What is it?")
    until(lambda: "a cup[0.1,0.2,0.5,0.7]" in chat())
    assert "and" not in chat()
    go_on.set()
    until(lambda: "eyes[0.5,0.5]" in chat())
    assert "What is it?" in chat()
    assert "<b>and</b> ![x](http://127.0.0.1:9/x.png) *two*" in chat()
    assert not shows("#chat .message b, #chat .message img, #chat .message em")
    sent = stub.asked[-1]
    assert (sent["temperature"], sent["top_p"], sent["top_k"], sent["max_tokens"]) == (0.1, 0.75, 0, 64)
    [image, text] = sent["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert text["text"] == "What is it?"
    assert stub.keys == ["Bearer k1", "Bearer k1"]

    until(lambda: shows("#drawn img"))
    with urllib.request.urlopen(find("#drawn img").get_attribute("src")) as response:
        drawn = Image.open(io.BytesIO(response.read())).convert("RGB")
    assert drawn.size == (300, 200)
    spans = until(lambda: shows("#chat span[style*=color]"))
    colours = [tuple(map(int, re.findall(r"\d+", span.value_of_css_property("color"))[:3])) for span in spans]
    assert [span.text for span in spans] == ["[0.1,0.2,0.5,0.7]", "[0.5,0.5]"]
    for x, y in ((30, 20), (150, 120), (30, 70), (90, 120)):
        assert drawn.getpixel((x, y)) == colours[0], (x, y)
    assert drawn.getpixel((200, 100)) == colours[1]
    for x, y in ((27, 70), (90, 70), (153, 70), (190, 100)):
        assert drawn.getpixel((x, y)) == (250, 250, 240), (x, y)

    never = Event()
    stub.script = ["one ", "two ", never, *["more "] * 1000]
    ask("Count.")
    until(lambda: "one two" in chat())
    find("#stop").click()
    time.sleep(0.3)
    never.set()
    assert stub.cut.wait(10)
    assert "more" not in chat()
    assert [one["role"] for one in stub.asked[-1]["messages"]] == ["user", "assistant", "user"]

    stub.status, stub.error = 400, "no such <i>thing</i>"
    ask("Fail?")
    until(lambda: "no such <i>thing</i>" in chat())
    stub.status, stub.script = 200, ["fine", END]
    find("#undo").click()
    until(lambda: "no such" not in chat())
    assert find("#question textarea").get_attribute("value") == "Fail?"
    find("#submit").click()
    until(lambda: "fine" in chat())
    assert [one["content"] for one in stub.asked[-1]["messages"][1:]] == [first + second, "Count.", "one two ", "Fail?"]

    find("#clear").click()
    until(lambda: "What is it?" not in chat() and "fine" not in chat())
    assert shows("#picture img")
    ask("Once more")
    until(lambda: "fine" in chat())
    assert len(stub.asked[-1]["messages"]) == 1
    Image.new("RGB", (50, 60), "blue").save(picture)
    find("#picture button[aria-label='Remove Image']").click()
    until(lambda: "Once more" not in chat())

    for path in ("/etc/passwd", str(ROOT / "setup.py"), "setup.py"):
        with pytest.raises(urllib.error.HTTPError, match=r"40[34]"):
            urllib.request.urlopen(f"{site}/gradio_api/file={path}")
    assert [name for name in fetched() if not name.startswith((site, "data:", "blob:"))] == []


def test_the_page_has_its_picture_taken(site, stub, tmp_path):
    Image.new("RGB", (300, 200), "white").save(tmp_path / "picture.png")
    stub.script = ["a cup[0.1,0.2,0.5,0.7]", {"delta": {"boxes": [{"box": [30, 20, 150, 120]}]}, **END}]
    target = tmp_path / "page.png"
    program = runpy.run_path(str(ROOT / "examples" / "page_screenshot.py"))
    program["main"]([site, str(tmp_path / "picture.png"), "What is it?", str(target)])
    assert Image.open(target).size[0] == 1280
    assert target.stat().st_size < 60_000
