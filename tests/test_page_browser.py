"""report.html in a real browser, on a phone and on a desk; skipped where there is none."""

import shutil
from pathlib import Path

import pytest
from test_field import write_ordinary
from test_report import write_everything

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.slow  # starts a browser
@pytest.mark.parametrize("width", [390, 1280])
def test_figures_can_be_read_and_nothing_but_they_scrolls(run, width):
    browsers = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    write_everything(Path("runs"))
    for network in ("ConvNet", "LeNet", "MLP"):
        write_ordinary(Path("runs", network), "gallery:mnist_lenet_any_order", network, [80, 81], name="architectures")
    assert run("report")[0] == 0
    with browsers.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 844})
        page.goto(Path("runs/report/report.html").resolve().as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        shown = page.eval_on_selector_all(".wide img", "all => all.map(one => one.getBoundingClientRect().width)")
        boxes = page.eval_on_selector_all(".wide", "all => all.map(one => one.getBoundingClientRect().right)")
        assert shown
        assert min(shown) >= 600
        assert max(boxes) <= width
        if width > 1000:  # a desk shows tables whole
            tables = page.eval_on_selector_all(".scrolls, .wide", "all => all.map(o => o.scrollWidth - o.clientWidth)")
            assert max(tables) <= 1
        text = page.inner_text("main")
        browser.close()
    for claim in ("accuracy rises", "with as many images"):
        for place in range(len(text)):
            if text.startswith(claim, place):
                assert any(word in text[max(0, place - 60) : place] for word in ("claim:", "Published"))
