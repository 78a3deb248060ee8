"""The page in headless Chromium: on a phone, on a desktop, and in print."""

import os
import shutil

import pytest

from conftest import SENTENCES
from posttrain.ner.metrics import entity_scores, mistakes
from posttrain.report.page import write_report

from .planted import plant, write_ner

pytestmark = pytest.mark.slow

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
OVERFLOWING = """() => [...document.querySelectorAll('body *')].filter(e => !e.closest('svg, .scroll, .hidden'))
    .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 120))"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Reports of a complete chain, of an incomplete one with hostile text, and of a tagger."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("whole", "hostile", "ner")}
    whole = plant(folders["whole"], steps=1500)
    with (whole.run_dir("sft") / "metrics.jsonl").open("a") as log:
        log.write('{"step": 1500, "loss": 4000.0}\n')  # a spike: its axis is logarithmic
    long = (
        "x" * 300 + "<img src=https://example.com/a.png onerror=alert(1)> <script>fetch('https://example.com')</script>"
    )
    hostile = plant(folders["hostile"], stages=("sft", "sample"), prompt=lambda p: p + long, name="n" * 120)
    found = [[tag if i % 3 else tag.replace("PER", "ORG") for i, tag in enumerate(s)] for s in _tags()]
    ner = write_ner(folders["ner"], _words(), _tags(), found, entity_scores, mistakes)
    return {name: write_report(chain) for name, chain in (("whole", whole), ("hostile", hostile), ("ner", ner))}


def _words():
    return [[word for word, _ in s] for s in SENTENCES]


def _tags():
    return [[tag for _, tag in s] for s in SENTENCES]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from playwright.sync_api import sync_playwright

    assert shutil.which(CHROMIUM), f"{CHROMIUM} is not there: apt-get install chromium, or set CHROMIUM"
    with sync_playwright() as playwright:
        context = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield context
        context.close()


@pytest.mark.parametrize("name", ["whole", "hostile", "ner"])
@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (360, "dark"), (1280, "light"), (1280, "dark")])
def test_the_page_fits_phone_and_desktop(browser, pages, name, width, scheme):
    """Nothing is wider than the screen, no request is made, the console is empty, and axe finds no violations."""
    from axe_playwright_python.sync_playwright import Axe

    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    asked, said = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message) or dialog.dismiss())
    page.goto(pages[name].as_uri())
    page.evaluate("() => document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    assert page.evaluate(OVERFLOWING) == []
    assert asked == [pages[name].as_uri()]
    assert said == []
    found = Axe().run(page, options={"resultTypes": ["violations"]})
    assert found.violations_count == 0, found.generate_report()
    page.close()


def test_dark_mode_is_dark_and_print_is_white(browser, pages):
    page = browser.new_page(color_scheme="dark")
    page.goto(pages["whole"].as_uri())
    background = "() => getComputedStyle(document.body).backgroundColor"
    ink = "() => getComputedStyle(document.querySelector('svg text')).fill"
    assert page.evaluate(background) == "rgb(22, 22, 24)"
    light_ink = page.evaluate(ink)
    page.emulate_media(media="print")
    assert page.evaluate(background) == "rgb(255, 255, 255)"
    assert page.evaluate(ink) != light_ink
    pdf = page.pdf(format="A4")
    assert pdf.startswith(b"%PDF")
    page.close()


def test_no_figure_is_empty_or_drawn_outside_its_frame(browser, pages):
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.goto(pages["whole"].as_uri())
    page.evaluate("() => document.querySelectorAll('details').forEach(d => { d.open = true })")
    outside = page.evaluate(
        """() => [...document.querySelectorAll('svg.chart')].flatMap(svg => {
            const frame = svg.getBoundingClientRect();
            return [...svg.querySelectorAll('text')].filter(t => {
                const box = t.getBoundingClientRect();
                return box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1;
            }).map(t => svg.getAttribute('aria-label').slice(0, 30) + ' | ' + t.textContent);
        })"""
    )
    assert outside == []
    assert page.evaluate("() => document.querySelectorAll('svg.chart').length") >= 20
    page.close()
