"""A headless Chromium for tests that look at pages."""

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest


def open_browser(width: int = 1000, scripts: bool = True) -> Any:
    """Debian's Chromium with a window of `width` px; with `scripts` False it runs no JavaScript. Skips where selenium or a browser lacks."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: no page was opened in a browser")
    if lacking := [name for name in ("chromium", "chromedriver") if not shutil.which(name)]:
        pytest.skip(f"no page was opened in a browser: {', '.join(lacking)} not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", f"--window-size={width},900",
                 "--force-device-scale-factor=1"):
        options.add_argument(flag)
    if not scripts:
        options.add_experimental_option("prefs", {"profile.managed_default_content_settings.javascript": 2})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


@contextlib.contextmanager
def browser(width: int = 1000, scripts: bool = True) -> Iterator[Any]:
    """The same for the time of a block."""
    driver = open_browser(width, scripts)
    try:
        yield driver
    finally:
        driver.quit()
