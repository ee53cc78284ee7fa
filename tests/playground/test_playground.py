"""The playground in a real browser: what a visitor does, and what the page then says."""

import base64
import io
import json
import re
import subprocess
from pathlib import Path
from statistics import NormalDist

import httpx
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import expect

from tests.helpers import encode

ROOT = Path(__file__).parents[2]
THREE = ROOT / "docs/images/three.png"
FOLDER = ROOT / "service/playground"
TIMES = "\N{MULTIPLICATION SIGN}"
DIGIT_ONE = [(140, 40), (140, 90), (140, 140), (140, 190), (140, 240)]
DIGIT_THREE = [(80, 60), (120, 40), (170, 45), (190, 80), (170, 115), (130, 130), (170, 145)]
DIGIT_THREE += [(195, 185), (175, 225), (125, 240), (80, 220)]
OUT_OF_RANGE = "Networks: choose a whole number from"
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True}


def picture(kind="PNG", size=(40, 40), colour=200):
    return encode(Image.new("L", size, colour), kind)


def draw(page, points):
    pad = page.locator("#pad")
    pad.scroll_into_view_if_needed()
    box = pad.bounding_box()
    scale = box["width"] / 280
    page.mouse.move(box["x"] + points[0][0] * scale, box["y"] + points[0][1] * scale)
    page.mouse.down()
    for x, y in points[1:]:
        page.mouse.move(box["x"] + x * scale, box["y"] + y * scale)
    page.mouse.up()


def played(page, count=100):
    """Wait until the last network has been shown; return what the page says of all."""
    shown = "text => document.getElementById('count').textContent === text"
    page.wait_for_function(shown, arg=f"{count} of {count}")  # at once, where `expect` polls
    return page.locator("#verdict").text_content()


def show_three(page):
    page.set_input_files("#file", THREE)
    expect(page.locator("#pad-hint")).to_be_hidden()
    expect(page.locator("#verdict")).not_to_contain_text("test set")
    return played(page)


def pixels(page, canvas):
    """What is on a canvas, one number a pixel."""
    script = """c => [...c.getContext("2d").getImageData(0, 0, c.width, c.height).data]
        .filter((_, i) => i % 4 === 0)"""
    return page.locator(canvas).evaluate(script)


# The files


def test_page_has_a_strict_policy_and_is_cached_by_tag(http):
    page = http.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policies = page.headers.get_list("content-security-policy")  # the server's, the page's
    rules = dict(rule.split(" ", 1) for policy in policies for rule in policy.split("; "))
    assert rules == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self' data: blob:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    script = http.get("/playground/main.js")
    assert script.headers["content-type"] == "text/javascript; charset=utf-8"
    assert script.headers["x-content-type-options"] == "nosniff"
    for response in (page, script):
        path = response.url.path
        for asked, told in (("If-None-Match", "etag"), ("If-Modified-Since", "last-modified")):
            again = http.get(path, headers={asked: response.headers[told]})
            assert (again.status_code, again.content) == (304, b"")
            assert "content-security-policy" in again.headers
        assert http.head(path).headers["content-length"] == str(len(response.content))


@pytest.mark.parametrize("path", ["nothing.js", "..%2fapp.py", "%2e%2e/app.py", "a%00b", "x" * 999])
def test_nothing_outside_the_folder_is_served(http, problem, path):
    problem(http.get(f"/playground/{path}"), 404)


def test_the_page_has_one_address(http):
    for path in ("/playground/", "/playground/index.html"):
        assert http.get(path).headers["location"] == "../"  # wherever a proxy has put it
        assert http.get(path, follow_redirects=True).url.path == "/"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.js")), ids=lambda p: p.name)
def test_each_module_is_small_says_what_it_is_and_loads_nothing_foreign(path):
    text = path.read_text()
    assert text.startswith("// ")
    assert len(text.splitlines()) <= 300
    assert all(name.startswith("./") for name in re.findall(r'from "(.*?)"', text))
    assert "innerHTML" not in text
    assert re.sub(r"http://www\.w3\.org/\S*", "", text).count("://") == 0


# Pictures


def test_a_drawing_is_seen_as_the_network_sees_it_and_answered(page):
    draw(page, DIGIT_ONE)
    assert "says 1 with" in played(page)
    seen = pixels(page, "#seen")
    assert len(seen) == 64
    assert max(seen[3::8] + seen[4::8]) > 150 > max(seen[0::8] + seen[7::8])
    expect(page.locator("#seen-text")).to_contain_text(f"8 {TIMES} 8 pixels")


def test_a_small_drawing_is_fitted_to_the_frame_unless_told_not_to(page):
    draw(page, [(20, 20), (20, 50), (20, 90)])
    said = played(page)
    seen = pixels(page, "#seen")
    assert max(seen[3::8] + seen[4::8]) > 150
    page.uncheck("#fit")
    expect(page.locator("#verdict")).not_to_have_text(said)
    played(page)
    seen = pixels(page, "#seen")
    assert max(seen[3::8] + seen[4::8]) == 0


def test_one_can_draw_by_keyboard(page):
    page.locator("#pad").focus()
    for key in ["ArrowUp"] * 5 + ["Space"] + ["ArrowDown"] * 10 + ["Space"]:
        page.keyboard.press(key)
    assert "says 1 with" in played(page)
    page.keyboard.press("Delete")
    expect(page.locator("#verdict")).to_contain_text("Give it a picture")


@pytest.mark.parametrize("size", [(390, 844), (360, 640)])
def test_a_phone_shows_the_pad_at_once_scrolls_no_line_sideways_and_takes_touches(
    visit, digits, size
):
    width, height = size
    page = visit(digits, viewport={"width": width, "height": height}, has_touch=True)
    played(page)
    box = page.locator("#pad").bounding_box()
    assert box["y"] + box["height"] <= height
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for language in page.locator("#languages button").all():
        language.click()
        assert page.locator("#code").evaluate("box => box.scrollWidth <= box.clientWidth")
    page.click("#clear")
    page.locator("#pad").tap()
    played(page)
    assert sum(pixels(page, "#seen")) > 0
    below = page.locator("#short-verdict")  # the answer itself is out of sight
    assert below.inner_text() in page.locator("#verdict").inner_text()
    assert "networks say" in below.inner_text()
    box = below.bounding_box()
    assert box["y"] + box["height"] <= height


def test_an_example_says_what_it_is(page, digits):
    examples = page.locator("#example-list button")
    listed = httpx.get(f"{digits}/v1/models/digits-mlp/examples").json()["examples"]
    assert 0 < examples.count() <= len(listed)
    examples.nth(1).click()
    expect(examples.nth(1)).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#verdict")).to_contain_text(f"The test set says {listed[1]['label']}.")
    sent = httpx.get(digits + listed[1]["url"]).content
    played(page)
    assert pixels(page, "#seen") == list(Image.open(io.BytesIO(sent)).convert("L").tobytes())


def test_who_draws_on_an_example_starts_from_an_empty_pad(page):
    nine = page.locator("#example-list button:has(img[alt='9'])").first
    nine.click()
    expect(page.locator("#verdict")).to_contain_text("The test set says 9.")
    draw(page, DIGIT_THREE)
    expect(nine).to_have_attribute("aria-pressed", "false")
    expect(page.locator("#verdict")).to_contain_text("You drew it.")
    assert "says 3 with" in played(page)
    page.set_input_files("#file", THREE)  # one's own picture stays, to be drawn upon
    played(page)
    before = pixels(page, "#seen")
    draw(page, [(20, 20)])
    expect(page.locator("#verdict")).to_contain_text("You drew it.")
    played(page)
    changed = (abs(a - b) > 50 for a, b in zip(before, pixels(page, "#seen"), strict=True))
    assert 0 < sum(changed) < 16


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_a_picture_can_be_dropped_and_pasted(page, way):
    script = """([way, data]) => {
        const transfer = new DataTransfer();
        const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
        transfer.items.add(new File([bytes], "p.png", {type: "image/png"}));
        const name = way === "drop" ? "dataTransfer" : "clipboardData";
        const Kind = way === "drop" ? DragEvent : ClipboardEvent;
        document.body.dispatchEvent(new Kind(way, {[name]: transfer, bubbles: true}));
    }"""
    page.evaluate(script, [way, base64.b64encode(picture(colour=77)).decode()])
    played(page)
    assert set(pixels(page, "#seen")) == {77}


# The answer


def test_the_answer_is_the_services(page, digits):
    said = show_three(page)
    asked = {"content": THREE.read_bytes(), "headers": {"Content-Type": "image/png"}}
    plain = httpx.post(f"{digits}/predict", **asked).json()["predictions"][0]
    doubt = httpx.post(f"{digits}/uncertainty", **asked).json()["predictions"][0]
    assert f"Eval mode says {plain['label']} with {plain['probability']:.0%}" in said
    assert f"say {doubt['label']} with {max(doubt['mean']):.0%}" in said
    rows = page.locator("#bars tr")
    assert rows.count() == 10
    assert (
        rows.nth(plain["index"]).locator("td").nth(1).inner_text()
        == f"{max(plain['probabilities']):.0%}"
    )
    expect(page.locator("#total")).to_have_text(f"{doubt['predictive_entropy']:.2f} of 2.30")
    expect(page.locator("#mutual")).to_have_text(f"{doubt['mutual_information']:.2f}")
    expect(page.locator("#spoken")).to_contain_text("100 thinned networks say")
    page.locator("summary").nth(2).click()
    expect(page.get_by_text("Mutual information, the epistemic part")).to_be_visible()


def test_networks_arrive_one_at_a_time_and_can_be_looked_at_again(visit, digits):
    page = visit(digits, motion=True)
    page.set_input_files("#file", THREE)
    expect(page.locator("#count")).to_have_text(re.compile(r"^[1-9] of 100$"))
    page.click("#play")
    first = page.locator("#count").inner_text()
    page.wait_for_timeout(300)
    assert page.locator("#count").inner_text() == first
    page.locator("#scrub").fill("3")
    expect(page.locator("#count")).to_have_text("3 of 100")
    expect(page.locator("#masks-title")).to_have_text("Thinned network 3")
    kept = page.locator("#masks .small").all_inner_texts()
    assert len(kept) == 2
    assert all(re.fullmatch(r"\d+ of 256 kept", text) for text in kept)
    page.locator("#scrub").press("ArrowRight")
    assert page.locator("#masks .small").all_inner_texts() != kept
    page.select_option("#speed", "once")
    page.click("#play")
    played(page)


def test_seed_masks_and_number_of_networks_are_adjustable(page):
    said = show_three(page)
    error = page.locator("#error-text").inner_text()
    page.locator("#seed").fill("7")
    page.locator("#seed").press("Enter")
    page.locator("#samples").fill("400")
    page.locator("#samples").press("Enter")
    page.select_option("#kind", "independent")
    expect(page.locator("#code")).to_contain_text("samples=400&seed=7&masks=independent")
    assert played(page, 400) != said
    expect(page.locator("#error-text")).not_to_have_text(error)
    doubt = page.locator("#total").inner_text().split()[0]
    expect(page.locator("#odd tr").nth(0).locator("td").nth(1)).to_have_text(doubt)


def test_train_mode_differs_and_eval_mode_does_not_whatever_p_is(page):
    said = show_three(page)  # "Eval mode says 3 with ..."
    remarks = page.locator(".remark")
    expect(remarks.nth(0)).to_have_text("identical to the last digit")
    expect(remarks.nth(1)).to_have_text(re.compile(r"different, by [\d.]+ points"))
    expect(page.locator(".pair").nth(0)).to_contain_text(said.split()[3] + ", ")
    own = page.locator("#layers").inner_text()
    assert f"p = 0.5, kept {TIMES} 2" in own
    evaluated = page.locator(".pair").nth(0).inner_text()
    page.locator("#p").fill("0.9")
    expect(page.locator("#layers")).to_contain_text(f"p = 0.9, kept {TIMES} 10")
    expect(page.locator("#units-text")).to_contain_text("0.9) = 10")
    assert page.locator(".pair").nth(0).inner_text() == evaluated
    page.click("#p-own")
    expect(page.locator("#layers")).to_have_text(re.compile(rf"p = 0\.5, kept {TIMES} 2"))
    page.locator("#p").fill("0")
    expect(remarks.nth(1)).to_have_text("identical")


def test_odd_pictures_stand_beside_yours(page):
    show_three(page)
    rows = page.locator("#odd tr")
    expect(rows).to_have_count(5)
    total = page.locator("#total").inner_text().split()[0]
    expect(rows.nth(0).locator("td").nth(1)).to_have_text(total)
    doubt = [row.locator("td").nth(1).inner_text() for row in rows.all()]
    assert len(set(doubt)) > 2
    expect(page.locator("#odd-text")).to_contain_text("It doubts")
    page.click("#odd-again")
    expect(rows.nth(4).locator("td").nth(1)).not_to_have_text(doubt[4])
    assert rows.nth(0).locator("td").nth(1).inner_text() == doubt[0]


@pytest.mark.parametrize(
    ("entropy", "words"),
    [(1.01, "noise most, hardly more than yours."), (2, "noise most, 2 times as much as yours.")],
)
def test_how_much_more_is_said_as_people_do(page, entropy, words):
    show_three(page)
    expect(page.locator("#odd tr")).to_have_count(5)

    def answer(route):
        told = route.fetch().json()
        for i, one in enumerate(told["predictions"]):
            one["predictive_entropy"] = (1, 0.9, 0.9, 0.9, entropy)[i]
        route.fulfill(json=told)

    asked = re.compile(r"/uncertainty\?")
    page.route(asked, answer)
    page.click("#odd-again")
    expect(page.locator("#odd-text")).to_contain_text(words)
    page.unroute(asked)


def test_one_is_not_many(page):
    page.locator("#samples").fill("1")
    page.set_input_files("#file", THREE)
    expect(page.locator("#verdict")).to_contain_text("One thinned network says")
    played(page, 1)
    label = page.locator("#mean-chart").get_attribute("aria-label")
    assert label.startswith("Running mean after 1 network: ")
    page.locator("#p").fill("0.95")
    expect(page.locator("#units-text")).to_contain_text("1 of 24 units stays, each")


# Code


@pytest.mark.parametrize("language", ["curl", "Python client", "Open Inference Protocol"])
def test_the_code_gives_the_answer_of_the_page(page, language, tmp_path):
    show_three(page)
    page.get_by_role("button", name=language).click()
    code = page.locator("#code").inner_text()
    page.click("#copy")
    assert page.evaluate("navigator.clipboard.readText()") == code
    with page.expect_download() as saved:
        page.click("#save")
    saved.value.save_as(tmp_path / saved.value.suggested_filename)
    command = [ROOT / ".venv/bin/python", "-c"] if "Python" in language else ["bash", "-c"]
    run = subprocess.run([*command, code], cwd=tmp_path, capture_output=True, text=True, check=True)
    total = float(page.locator("#mutual").inner_text())
    if language == "curl":
        found = json.loads(run.stdout)["predictions"][0]["mutual_information"]
    elif language == "Python client":
        found = float(run.stdout.split()[-1])
    else:
        outputs = {o["name"]: o["data"] for o in json.loads(run.stdout)["outputs"]}
        found = outputs["mutual_information"][0]
    assert found == pytest.approx(total, abs=0.0051)


# Models


def test_models_and_versions_can_be_chosen(visit, digits):
    page = visit(digits)
    played(page)
    assert page.locator("#version option").all_inner_texts() == ["3", "2", "1"]
    page.select_option("#version", "2")  # has no examples
    expect(page.locator("#verdict")).to_contain_text("Give it a picture")
    expect(page.locator("#examples")).to_be_hidden()
    first = show_three(page)
    page.select_option("#version", "1")
    expect(page.locator("#verdict")).not_to_have_text(first)
    expect(page.locator("#code")).to_contain_text("digits-mlp/versions/1/uncertainty")
    page.select_option("#model", "colour-cnn")
    expect(page.locator("#seen-text")).to_contain_text(f"16 {TIMES} 16 pixels, colour")
    played(page)
    assert page.locator("#bars tr").count() == 4


def test_of_two_choices_in_a_row_the_second_counts(visit, digits):
    page = visit(digits)
    played(page)
    held = []
    for late in ("", "/examples"):
        page.select_option("#model", "colour-cnn")
        page.click("#clear")
        expect(page.locator("#examples")).to_be_hidden()
        url = f"{digits}/v1/models/digits-mlp/versions/3{late}"
        page.route(url, lambda route: held.append(route))
        with page.expect_request(url):
            page.select_option("#model", "digits-mlp")
        page.select_option("#model", "colour-cnn")
        show_three(page)
        held.pop().continue_()
        page.unroute(url)
        page.click("#clear")
        show_three(page)
        expect(page.locator("#code")).to_contain_text("models/colour-cnn/versions/1/")
        expect(page.locator("#seen-text")).to_contain_text(f"16 {TIMES} 16 pixels")
        expect(page.locator("#examples")).to_be_hidden()
    page.select_option("#model", "digits-mlp")
    expect(page.locator("#examples")).to_be_visible()
    expect(page.locator("#code")).to_contain_text("models/digits-mlp/versions/3/")


# What goes wrong


def test_a_service_that_takes_less_is_asked_for_less(visit, narrow):
    page = visit(narrow, expected=["413", "422"])
    played(page, 20)
    expect(page.locator("#samples")).to_have_value("20")
    expect(page.locator("#alert")).to_be_hidden()
    expect(page.locator("#examples-key")).to_be_visible()  # doubt over as many as may be
    rows = page.locator("#odd tr")
    expect(rows).to_have_count(5)
    total = page.locator("#total").inner_text().split()[0]
    expect(rows.nth(0).locator("td").nth(1)).to_have_text(total)
    expect(page.locator("#alert")).to_be_hidden()
    page.locator("#samples").fill("30")
    page.locator("#samples").press("Enter")
    expect(page.locator("#alert-text")).to_have_text(f"{OUT_OF_RANGE} 1 to 20.")
    too_large = {"name": "a.png", "mimeType": "image/png", "buffer": picture(size=(400, 400))}
    page.locator("#samples").fill("20")
    page.set_input_files("#file", too_large)
    expect(page.locator("#alert")).to_contain_text("This picture is too large for the service.")


def test_errors_are_shown_in_words_for_people_with_what_to_do(visit, digits):
    page = visit(digits, expected=["415", "422", "400", "503", "net::ERR"])
    show_three(page)
    alert, again = page.locator("#alert"), page.locator("#alert-again")
    for name, content, words in [
        ("a.gif", picture("GIF"), "Choose a picture in PNG, JPEG or WebP."),
        ("a.png", picture()[:60], "This picture cannot be read. It may be damaged,"),
        ("empty.png", b"", "This picture cannot be read. It may be damaged,"),
    ]:
        page.click("#clear")
        file = {"name": name, "mimeType": f"image/{name[-3:]}", "buffer": content}
        page.set_input_files("#file", file)
        expect(alert).to_contain_text(words)
        expect(again).to_be_hidden()
    page.locator("#samples").fill("0")
    page.set_input_files("#file", THREE)
    expect(alert).to_contain_text(f"{OUT_OF_RANGE} 1 to 1000.")
    page.locator("#samples").fill("50")
    page.locator("#samples").press("Tab")
    expect(alert).to_be_hidden()
    played(page, 50)
    page.route("**/stream*", lambda route: route.abort())
    page.click("#reseed")
    expect(alert).to_contain_text("The service does not answer. Check your connection")
    page.unroute("**/stream*")
    page.route("**/stream*", lambda route: route.fulfill(status=503, json={"detail": "the queue"}))
    again.click()
    expect(alert).to_contain_text("The service is busy: too many ask at once. Wait a few seconds.")
    page.unroute("**/stream*")
    again.click()
    played(page, 50)
    expect(alert).to_be_hidden()


def test_a_refused_picture_is_not_sent_again(visit, digits):
    page = visit(digits, expected=["415"])
    played(page)
    page.select_option("#version", "2")  # has no examples
    expect(page.locator("#examples")).to_be_hidden()
    asked = []
    page.on("request", lambda request: request.method == "POST" and asked.append(request.url))
    gif = {"name": "a.gif", "mimeType": "image/gif", "buffer": picture("GIF")}
    page.set_input_files("#file", gif)
    expect(page.locator("#alert")).to_be_visible()
    assert len(asked) == 1
    page.select_option("#model", "colour-cnn")
    expect(page.locator("#verdict")).to_contain_text("Give it a picture")
    expect(page.locator("#alert")).to_be_hidden()
    page.click("#reseed")
    page.wait_for_timeout(300)
    assert len(asked) == 1


def test_page_and_documentation_work_under_any_prefix(visit, digits):
    page = visit(digits, prefix="/apps/dropserve")
    played(page)
    expect(page.locator("#odd tr")).to_have_count(5)
    expect(page.locator("#code")).to_contain_text(f"{digits}/apps/dropserve/v1/models/digits-mlp")
    page.get_by_role("link", name="API documentation").first.click()
    page.locator(".opblock-get", has_text="/readyz").first.click()
    page.get_by_role("button", name="Try it out").click()
    page.get_by_role("button", name="Execute").click()
    expect(page.locator(".request-url pre")).to_have_text(f"{digits}/apps/dropserve/readyz")
    expect(page.locator(".live-responses-table")).to_contain_text("digits-mlp")


# Measured answers


def test_sections_link_to_the_experiments_that_explain_them(visit, digits):
    page = visit(digits, prefix="/apps/dropserve")
    played(page)
    expect(page.locator("#odd tr")).to_have_count(5)
    for section in page.locator(".story > section").all()[:-1]:  # the last is code
        assert section.locator(".why a").count() >= 1
    links = [link.get_attribute("href") for link in page.locator(".why a").all()]
    page.locator(".why a").first.click()
    expect(page).to_have_url(re.compile("/apps/dropserve/playground/results.html#averaging$"))
    anchors = {anchor.get_attribute("id") for anchor in page.locator("a[id]").all()}
    assert {link.partition("#")[2] for link in links} <= anchors
    page.set_viewport_size(PHONE["viewport"])
    width = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(width) == 0
    pictures = page.locator(".results img")
    assert pictures.count() == len(anchors - {"questions"})
    for picture in pictures.all():
        picture.scroll_into_view_if_needed()
        expect(picture).to_have_js_property("complete", True)
        assert picture.evaluate("image => image.naturalWidth") > 300
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    back = page.get_by_role("link", name="Playground")
    assert back.evaluate("link => link.href").endswith("/apps/dropserve/")


# Kinds of noise


def choose(page, name):
    """Show a three to a model; wait for its answer, in both modes if it has two."""
    page.select_option("#model", name)
    expect(page.locator("#about")).to_contain_text(f"{name} is a ")
    if page.locator("#pad-hint").is_visible():
        page.set_input_files("#file", THREE)
    if name == "none":
        return expect(page.locator("#verdict")).to_contain_text("Eval mode says")
    expect(page.locator("#code")).to_contain_text(f"models/{name}/")
    expect(page.locator("#layers tr.dropout th").first).to_be_visible()
    return played(page)


def last_sample(url, name):
    """What a stream says of a model's sites, and the noise of its last sample: bits, or bytes."""
    path = f"{url}/v1/models/{name}/uncertainty/stream"
    stream = httpx.post(path, content=THREE.read_bytes(), headers={"Content-Type": "image/png"})
    told = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: ")]
    sites, kept = told[0]["sites"], told[-2]["kept"]
    drawn = [np.frombuffer(base64.b64decode(text), np.uint8) for text in kept]
    for i, site in enumerate(sites):
        if site["distribution"] == "bernoulli":
            drawn[i] = np.unpackbits(drawn[i])[: site["units"]]
    return sites, drawn


def cells(canvas, rows, columns):
    """The colours [rows, columns, RGBA] in the middle of the cells of a grid."""
    script = """(c, [rows, columns]) => {
        const {data} = c.getContext("2d").getImageData(0, 0, c.width, c.height);
        const middle = (i, count, size) => Math.floor((i + 0.5) * size / count);
        return Array.from({length: rows * columns}, (_, i) => {
            const y = middle(Math.floor(i / columns), rows, c.height);
            const at = 4 * (y * c.width + middle(i % columns, columns, c.width));
            return [...data.slice(at, at + 4)];
        });
    }"""
    return np.array(canvas.evaluate(script, [rows, columns])).reshape(rows, columns, 4)


def colour(page, name):
    script = "name => getComputedStyle(document.documentElement).getPropertyValue(name).trim()"
    text = page.evaluate(script, f"--{name}")
    return np.array([int(text[i : i + 2], 16) for i in (1, 3, 5)])


@pytest.mark.parametrize(
    ("name", "place", "count"),
    [
        ("vanilla", "dropout1 vanilla dropout, p = 0.5", "kept"),
        ("dropconnect", f"hidden1 DropConnect, p = 0.5, weights 32 {TIMES} 65", "kept"),
        ("zoneout", f"update zoneout, p = 0.1, 8 steps {TIMES} 32 units", "updated"),
        ("variational", "inputs variational dropout, p = 0.1, the same at all steps", "kept"),
        ("wide", f"block1.noise dropout, p = 0.1, 8 channels of 8 {TIMES} 8", "kept"),
    ],
)
def test_a_mask_is_drawn_bit_by_bit_where_it_belongs(visit, noises, name, place, count):
    page = visit(noises)
    choose(page, name)
    (site, *_), (bits, *_) = last_sample(noises, name)
    box = page.locator("#masks > div").first
    expect(box.locator(".site")).to_have_text(place)
    expect(box.locator(".small")).to_have_text(f"{bits.sum():,} of {len(bits):,} {count}")
    shape = site["shape"]
    if len(shape) == 3:  # tiles, two rows of four, with gaps as wide as a cell
        expected = np.zeros((18, 36), np.uint8)
        for i, tile in enumerate(bits.reshape(shape)):
            top, left = i // 4 * 9, i % 4 * 9
            expected[top : top + 8, left : left + 8] = tile
        expected = expected[:17, :35]
    elif shape[0] > 1 and len(shape) == 2:
        expected = bits.reshape(shape)
    else:  # nearly a square
        expected = bits.reshape({32: (4, 8), 8: (2, 4)}[len(bits)])
    drawn = cells(box.locator("canvas"), *expected.shape)
    kept = (drawn[..., :3] == colour(page, "accent")).all(-1)
    assert (kept == expected).all()


def test_normal_numbers_are_shades_that_follow_their_quantiles(visit, noises):
    page = visit(noises)
    choose(page, "gaussian")
    (site,), (values,) = last_sample(noises, "gaussian")
    assert site["units"] == len(values) == 32
    box = page.locator("#masks > div")
    expect(box.locator(".site")).to_have_text(
        "dropout1 Gaussian dropout, p = 0.2 (mean 1, std 0.5)"
    )
    part = (values[:, None] - 127.5) / 127.5
    low, middle, high = (colour(page, name) for name in ("quiet", "track", "accent"))
    expected = middle + abs(part) * (np.where(part < 0, low, high) - middle)
    drawn = cells(box.locator("canvas"), 4, 8).reshape(32, 4)[:, :3]
    assert abs(drawn - expected).max() <= 1
    told = re.fullmatch(
        r"32 numbers from (\S+) to (\S+), on average (\S+)", box.locator(".small").inner_text()
    )
    lowest, highest, mean = (float(text.replace("\N{MINUS SIGN}", "-")) for text in told.groups())
    numbers = [NormalDist(1, 0.5).inv_cdf((int(v) + 0.5) / 256) for v in values]
    assert lowest == pytest.approx(min(numbers), abs=0.02)
    assert highest == pytest.approx(max(numbers), abs=0.02)
    assert mean == pytest.approx(sum(numbers) / 32, abs=0.02)
    expect(page.locator("#verdict")).to_contain_text("100 noisy networks say")
    page.locator("#p").fill("0.5")
    expect(page.locator("#layers")).to_contain_text(f"p = 0.5, {TIMES} noise of std 1")


def test_noise_without_a_rate_has_no_slider(visit, noises):
    page = visit(noises)
    choose(page, "noise")
    expect(page.locator("#masks .site").nth(0)).to_have_text(
        f"input additive Gaussian noise, std 0.2, 8 {TIMES} 8 pixels"
    )
    expect(page.locator("#p")).to_be_disabled()
    expect(page.locator("#p-own")).to_be_disabled()
    expect(page.locator("#p-why")).to_contain_text("no rate that could be turned")
    expect(page.locator("#layers")).to_contain_text("+ noise of std 0.1")
    said = page.locator("main").inner_text().splitlines()
    assert [line for line in said if re.search(r"null|NaN|undefined|Infinity", line)] == []
    choose(page, "dropconnect")
    expect(page.locator("#p")).to_be_enabled()
    expect(page.locator("#p-why")).to_be_hidden()
    expect(page.locator("#layers")).to_contain_text(f"p = 0.5, kept {TIMES} 2")


def test_a_network_without_noise_predicts_and_says_that_there_is_nothing_to_sample(visit, noises):
    page = visit(noises)
    choose(page, "none")
    asked = {"content": THREE.read_bytes(), "headers": {"Content-Type": "image/png"}}
    plain = httpx.post(f"{noises}/v1/models/none/predict", **asked).json()["predictions"][0]
    said = page.locator("#verdict")
    expect(said).to_contain_text(f"says {plain['label']} with {plain['probability']:.0%}")
    expect(said).to_contain_text("This network draws no noise, so there is nothing to sample")
    row = page.locator("#bars tr").nth(plain["index"])
    expect(row.locator("td").nth(1)).to_have_text(f"{plain['probability']:.0%}")
    expect(row.locator("td").nth(2)).to_be_hidden()
    for part in page.locator(".sampled").all():
        expect(part).to_be_hidden()
    choose(page, "gaussian")
    expect(page.locator("#masks")).to_be_visible()


def test_a_transformers_many_sites_unfold(visit, noises):
    page = visit(noises, **PHONE)
    choose(page, "transformer")
    sites, drawn = last_sample(noises, "transformer")
    assert page.locator("#masks > div").count() == 4
    more = page.locator(".more-masks")
    more.locator("summary").click()
    boxes = more.locator(".masks > div")
    assert boxes.count() == len(sites) - 4 > 12
    for i in (0, len(sites) - 5):
        box, bits = boxes.nth(i), drawn[i + 4]
        wanted = f"{bits.sum():,} of {len(bits):,} kept"
        expect(box.locator(".small")).to_have_text(
            wanted if len(bits) > 1 else "kept" if bits[0] else "dropped"
        )
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["viewport"]["width"]
    choose(page, "gaussian")
    expect(more).to_be_hidden()


def test_a_line_says_how_the_network_was_trained(visit, noises):
    page = visit(noises)
    for name, words in {
        "vanilla": "a fully connected network of 32 units, trained with vanilla dropout, p = 0.5; "
        "it has batch normalisation; noise comes before the activation.",
        "noise": "with additive Gaussian noise, std 0.1; additive Gaussian noise of the input, std",
        "dropconnect": "with DropConnect, p = 0.5; the pictures of a batch shared their noise.",
        "zoneout": "a recurrent network (GRU) of 32 units that reads the picture row by row",
        "wide": "a wide residual network of 8-16 channels, trained with dropout, p = 0.1.",
        "transformer": "dropout, p = 0.1; stochastic depth, p up to 0.1.",
        "none": "a fully connected network of 32 units, trained without noise.",
    }.items():
        page.select_option("#model", name)
        expect(page.locator("#about")).to_contain_text(f"{name} is a ")
        expect(page.locator("#about")).to_contain_text(words)


# For everyone


def test_axe_finds_nothing(visit, digits):
    page = visit(digits, expected=["415"])
    played(page)
    expect(page.locator("#odd tr")).to_have_count(5)
    for summary in page.locator("summary").all():
        summary.click()

    def check(scheme):
        page.emulate_media(color_scheme=scheme)
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()

    check("light")
    page.set_viewport_size(PHONE["viewport"])
    check("dark")
    gif = {"name": "a.gif", "mimeType": "image/gif", "buffer": picture("GIF")}
    page.set_input_files("#file", gif)
    expect(page.locator("#alert")).to_be_visible()
    check("dark")
    check("light")
