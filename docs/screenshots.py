"""Takes the playground's pictures: `make screenshots` writes docs/images/playground-*.png.

Trains the digits model anew, serves it, shows it an unclear three, and waits until a hundred
thinned networks have answered.
"""

import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
from PIL import Image
from playwright.sync_api import Browser, expect, sync_playwright

IMAGES = Path(__file__).parent / "images"
SIZES = {"desktop": (1440, 1140), "phone": (390, 1900)}
DROPSERVE = Path(sys.executable).with_name("dropserve")


def main() -> None:
    """Train, serve, take the pictures."""
    with tempfile.TemporaryDirectory() as root, socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        free.close()
        train = [DROPSERVE, "train", "--dataset", "digits", "--checkpoints", root]
        subprocess.run(train, check=True)  # noqa: S603  our own command
        settings = {"DROPSERVE_CHECKPOINTS": root, "DROPSERVE_PORT": str(port)}
        server = subprocess.Popen([DROPSERVE, "serve"], env=os.environ | settings)  # noqa: S603
        try:
            url = f"http://127.0.0.1:{port}/"
            wait_for(url)
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(
                    executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
                )
                for size in SIZES:
                    for scheme in ("light", "dark"):
                        take(browser, url, size, scheme)
        finally:
            server.terminate()
            server.wait()


def wait_for(url: str) -> None:
    """Wait until the service answers."""
    for _ in range(600):
        try:
            httpx.get(url).raise_for_status()
        except httpx.TransportError:
            time.sleep(0.1)
        else:
            return
    raise SystemExit("the service did not start")


def take(browser: Browser, url: str, size: str, scheme: str) -> None:
    """Save one picture, in as few colours as it needs."""
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if scheme == "dark" else "light",
        reduced_motion="reduce",
    )
    page = context.new_page()
    page.goto(url)
    expect(page.locator("#verdict")).to_contain_text("The test set says")
    page.set_input_files("#file", IMAGES / "three.png")
    expect(page.locator("#verdict")).to_contain_text("Your picture")
    expect(page.locator("#count")).to_have_text("100 of 100")
    shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    few = shot.quantize(96, dither=Image.Dither.NONE)
    few.save(IMAGES / f"playground-{size}-{scheme}.png", optimize=True)
    context.close()


if __name__ == "__main__":
    main()
