"""A real browser on real servers; every page is watched for errors and for who it talks to."""

import shutil

import httpx
import pytest
from playwright.sync_api import expect, sync_playwright

from dropserve.models import checkpoint
from dropserve.models.networks import NetworkConfig
from tests.conftest import DIGITS
from tests.helpers import dropserve

QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync")


@pytest.fixture(scope="module")  # Playwright's event loop runs as long: no asyncio.run() beside it
def browser():
    """A browser for all tests here."""
    chromium = shutil.which("chromium")
    assert chromium, "these tests need chromium: `make browser` installs it"
    expect.set_options(timeout=20_000)
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", *QUIET]
        running = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield running
        running.close()


@pytest.fixture(scope="session")
def servers(tmp_path_factory, make_server, checkpoints):
    """A usual server and a narrow one; their digits-mlp has a trained version 3, with examples."""
    root = tmp_path_factory.mktemp("playground") / "checkpoints"
    shutil.copytree(checkpoints, root)
    dropserve("train", "--epochs", 3, "--samples", 0, "--checkpoints", root)
    both = [make_server(root), make_server(root, max_images=2, max_samples=20, max_pixels=100_000)]
    return [server.start().url for server in both]


@pytest.fixture(scope="session")
def digits(servers):
    """The address of the usual one."""
    return servers[0]


@pytest.fixture
def http(digits):
    """A client of it."""
    with httpx.Client(base_url=digits) as client:
        yield client


@pytest.fixture(scope="session")
def narrow(servers):
    """The address of the one that takes two pictures, small ones, and twenty networks at most."""
    return servers[1]


def _network(kind, regularizer="dropout", hidden=(32,), dropout=(0.5,), **more):
    return NetworkConfig(kind, DIGITS.shape, 10, hidden, dropout, regularizer=regularizer, **more)


NETWORKS = {
    "vanilla": _network("mlp", "vanilla", before_activation=True, batch_norm=True),
    "gaussian": _network("mlp", "gaussian", dropout=(0.2,)),
    "noise": _network("mlp", "noise", dropout=(0.1,), input_dropout=0.2),
    "dropconnect": _network("mlp", "dropconnect", mask_scope="batch"),
    "zoneout": _network("gru", "zoneout", dropout=(0.1,)),
    "variational": _network("gru", "variational", dropout=(0.1, 0.2)),
    "wide": _network("wrn", hidden=(), dropout=(0.1,), channels=(8, 16)),
    "transformer": _network("vit", dropout=(0.1,), blocks=4, stochastic_depth=0.1),
    "none": _network("mlp", dropout=(0.0,)),
}


@pytest.fixture(scope="session")
def noises(tmp_path_factory, make_server):
    """The address of a server of `NETWORKS`, as they are before they are trained."""
    root, classes = tmp_path_factory.mktemp("noises"), tuple("0123456789")
    for name, network in NETWORKS.items():
        metadata = checkpoint.Metadata(name, network, DIGITS, classes)
        checkpoint.save(root, network.build(), metadata)
    return make_server(root, default_model="none").start().url


def open_page(browser, url, faults, *, motion=False, expected=(), prefix="", **options):
    """Open the page of a server, or of a proxy in front of it that adds a prefix to all its paths.

    What fails, or leaves the prefix or the origin, goes to `faults`.
    """
    context = browser.new_context(reduced_motion="no-preference" if motion else "reduce", **options)
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=url)
    page = context.new_page()
    page.set_default_timeout(15_000)
    server, url = url, url + prefix
    if prefix:
        forward = lambda route: route.fulfill(  # noqa: E731  Playwright calls it with a route alone
            response=route.fetch(url=route.request.url.replace(url, server))
        )
        page.route(f"{url}/**", forward)
    allowed = (*expected, "willReadFrequently")  # the tests read canvases, the page does not

    def fault(text):
        if not any(one in text for one in allowed):
            faults.append(text)

    def leave(request):
        if not request.url.startswith((url, "blob:" + server)):
            faults.append(f"request to {request.url}")

    page.on("console", lambda m: m.type in ("error", "warning") and fault(m.text))
    page.on("pageerror", lambda error: fault(str(error)))
    page.on("request", leave)
    page.goto(url + "/")
    return page


@pytest.fixture
def visit(browser):
    """Open the page of a server; at the end nothing may have failed or left the origin."""
    faults, pages = [], []

    def make(url, **options):
        pages.append(open_page(browser, url, faults, **options))
        return pages[-1]

    yield make
    for page in pages:
        page.context.close()
    assert faults == []


@pytest.fixture(scope="module")
def shared(browser, digits):
    """A page for many tests, and its faults so far."""
    faults = []
    return open_page(browser, digits, faults), faults


@pytest.fixture
def page(shared):
    """The shared page as it opens, but for the picture: there is none."""
    page, faults = shared
    expect(page.locator("#example-list button").first).to_be_visible()
    page.evaluate("""() => {
        const settings = {samples: 100, seed: 0, kind: "stratified"};
        for (const id in settings) document.getElementById(id).value = settings[id];
        document.getElementById("fit").checked = true;
        document.getElementById("p-own").click();
    }""")
    page.click("#clear")
    expect(page.locator("#verdict")).to_contain_text("Give it a picture")
    yield page
    assert faults == []
