"""Take a picture of the web page with an answer on it; make docs/page.png by this.

    megatron-sphinx serve MODEL
    megatron-sphinx demo
    python examples/page_screenshot.py http://127.0.0.1:7860 PICTURE QUESTION docs/page.png

Needs selenium, chromium and chromedriver.
"""

import shutil
import sys
import time
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import WebDriverWait

SIZE = (1280, 860)
LEAST_SECONDS = 1.5  # that a page must stay as it is to be whole
MOST_SECONDS = 300
COLOURS = 64  # of the picture, which is drawn with few


def open_browser() -> WebDriver:
    """Open a browser that shows nothing."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for word in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{word}")
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    browser.set_window_size(*SIZE)
    return browser


def ask(browser: WebDriver, url: str, picture: Path, question: str) -> None:
    """Give the page a picture and a question, and wait for the whole answer."""

    def until(selector: str) -> None:
        WebDriverWait(browser, MOST_SECONDS).until(lambda _: browser.find_elements(By.CSS_SELECTOR, selector))

    def settle() -> None:
        seen, since = "", time.monotonic()
        while time.monotonic() - since < LEAST_SECONDS:
            if (shown := browser.find_element(By.TAG_NAME, "body").text) != seen:
                seen, since = shown, time.monotonic()
            time.sleep(0.1)

    browser.get(url)
    until("#picture input[type=file]")
    browser.find_element(By.CSS_SELECTOR, "#picture input[type=file]").send_keys(str(picture.resolve()))
    until("#picture img")
    settle()
    browser.find_element(By.CSS_SELECTOR, "#question textarea").send_keys(question)
    browser.find_element(By.ID, "submit").click()
    until("#chat [data-testid=bot]")
    settle()


def main(words: list[str]) -> None:
    """Write the picture of the page."""
    url, picture, question, target = words
    browser = open_browser()
    try:
        ask(browser, url, Path(picture), question)
        browser.save_screenshot(target)
    finally:
        browser.quit()
    Image.open(target).convert("RGB").quantize(COLOURS).save(target, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1:])
