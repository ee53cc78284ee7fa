"""A real browser on real servers; every page is watched for errors and for who it talks to."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync")


@pytest.fixture(scope="session")
def browser():
    chromium = shutil.which("chromium")
    assert chromium, "these tests need chromium: `make browser` installs it"
    expect.set_options(timeout=20_000)
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", *QUIET]
        running = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield running
        running.close()


@pytest.fixture(scope="session")
def digits(tmp_path_factory, make_server):
    """A server of the digits model, with examples; its address."""
    root = tmp_path_factory.mktemp("digits")
    dropserve = Path(sys.executable).with_name("dropserve")
    train = [dropserve, "train", "--dataset", "digits", "--epochs", "5", "--checkpoints", root]
    subprocess.run(train, check=True, stdout=subprocess.DEVNULL)
    return make_server(root, default_model=None).start().url


@pytest.fixture
def visit(browser):
    """Open the page of a server; at the end nothing may have failed or left the origin."""
    seen, contexts = [], []

    def make(url, *, motion=False, expected=(), **options):
        context = browser.new_context(
            reduced_motion="no-preference" if motion else "reduce", **options
        )
        context.grant_permissions(["clipboard-read", "clipboard-write"], origin=url)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)

        def fault(text):
            allowed = (
                *expected,
                "willReadFrequently",
            )  # the tests read canvases, the page does not
            if not any(one in text for one in allowed):
                seen.append(text)

        def leave(request):
            if not request.url.startswith((url, "blob:" + url)):
                seen.append(f"request to {request.url}")

        page.on("console", lambda m: m.type in ("error", "warning") and fault(m.text))
        page.on("pageerror", lambda error: fault(str(error)))
        page.on("request", leave)
        page.goto(url)
        return page

    yield make
    for context in contexts:
        context.close()
    assert seen == []
