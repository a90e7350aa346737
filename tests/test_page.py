"""The page of results, in headless Chromium: it opens without a network, sorts, filters, prints,
and reads on a phone and in the dark.
"""

import shutil

import pytest
from test_report import PLOTS, document, run

from sdsat.evaluation import outputs
from sdsat.evaluation.page import read_results, write_page
from sdsat.evaluation.summary import read_workers, summarize
from sdsat.files import read_json, write_json

TEXT = (
    "\n<b>1 < 2 & \"3\"</b> </script><script>document.title = 'hurt'</script> "
    "\u00e9\u65e5\U0001f389 \0 \ud800"
)
SHOWN = TEXT.replace("\0", "\ufffd").replace("\ud800", "\ufffd")  # what no page can hold
ACCEPTED = [[0, 4], [30, 40]]


@pytest.fixture(scope="module")
def browser():
    """Chromium, without a network."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no Chromium on PATH; install chromium and chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in (
        "--headless=new",
        "--no-sandbox",  # which root may not have
        "--disable-dev-shm-usage",
        "--window-size=1200,900",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ):
        options.add_argument(argument)
    opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Results of three problems: AR's seconds are 4, 10 and 2; the first two have texts."""
    folder = tmp_path_factory.mktemp("results") / "<b>&amp;"
    folder.mkdir()
    problems = []
    for ar, drafted, proposed in ((4.0, 2.0, (2, 2)), (10.0, 8.0, ()), (2.0, 1.25, (1, 0))):
        accepted = [min(1, count) for count in proposed] or (0, 0)
        drafts = run("two-step", 2, 8, drafted, 4, proposed or (0, 0), accepted, (0, 1, 0))
        problems.append([run("ar", 0, 8, ar, 8), drafts, run("two-step", 3, 8, 9.0, 5, (0, 0))])
        problems[-1][2]["accepted_by_depth"] = [0, 0]
    results = document(problems)
    results["settings"] = {**results["settings"], "model": "<i>tiny</i>"}
    write_json(folder / "worker_cpu.json", results)
    for task in ("cpu/0", "cpu/1"):
        lines = [
            (("ar", 0, 0), outputs.Output(TEXT, [])),
            (("two-step", 2, 0), outputs.Output(TEXT, ACCEPTED)),
        ]
        outputs.append_outputs(folder, "cpu", task, lines)
    summary = summarize(read_workers(folder))
    write_json(folder / "summary.json", summary)
    write_page([read_results(folder, summary)], folder / "index.html")
    return folder


@pytest.fixture
def page(browser, folder):
    """The page of `folder`, freshly opened."""
    return opened(browser, folder / "index.html")


def opened(browser, file):
    """Open a page, on a screen; it asks for nothing else and has no errors."""
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.get(file.as_uri())
    script = "return performance.getEntriesByType('resource').length"
    assert browser.execute_script(script) == 0
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    return browser


def shown(page, column):
    """The cells of a column of the problems that are shown, from above."""
    script = """return [...document.querySelectorAll('#problems tbody:not([hidden])')]
        .map((body) => body.rows[0].cells[arguments[0]].textContent.trim())"""
    return page.execute_script(script, column)


def click(page, selector):
    page.find_element("css selector", selector).click()


def choose(page, name, text):
    from selenium.webdriver.support.ui import Select

    Select(page.find_element("id", name)).select_by_visible_text(text)


def test_answers_stand_beside_ars_with_accepted_drafts_green(page):
    assert "<i>tiny</i>" in page.title and page.find_elements("css selector", "h1 i") == []
    assert shown(page, 1) == ["two-step, k = 2"] * 3  # the fastest
    click(page, "#problems tbody[data-setting='two-step, k = 2'] button")
    pair = page.find_element("css selector", "#problems tr:not([hidden]) .pair")
    plain, drafted = pair.find_elements("css selector", "figure")
    answers = [
        each.find_element("css selector", ".answer-text").get_property("textContent")
        for each in (plain, drafted)
    ]
    assert answers == [SHOWN, SHOWN]
    marks = [
        [mark.get_property("textContent") for mark in each.find_elements("css selector", "mark")]
        for each in (plain, drafted)
    ]
    assert marks == [[], [TEXT[first:end] for first, end in ACCEPTED]]
    assert plain.text.startswith("ar, k = 0: 8 passes, 4.000 seconds")
    assert drafted.text.startswith("two-step, k = 2: 4 passes, 2.000 seconds")
    red, green, blue = page.execute_script(
        "return getComputedStyle(document.querySelector('mark')).color.match(/\\d+/g).map(Number)"
    )
    assert green > max(red, blue)
    click(page, "#open")
    assert len(page.find_elements("css selector", "tr:not([hidden]) .pair")) == 2
    click(page, "#open")
    assert len(page.find_elements("css selector", "tr:not([hidden]) .pair")) == 0
    # the third problem has no text to open
    assert page.find_elements("css selector", "tbody[data-ar=ar-0-0-2] td button") == []


def test_rows_are_sorted_and_filtered(page):
    seconds = page.find_element("css selector", "#problems th:nth-child(3)")
    for order, expected in (
        ("ascending", ["1.250", "2.000", "8.000"]),
        ("descending", ["8.000", "2.000", "1.250"]),
    ):
        seconds.find_element("css selector", "button").click()
        assert shown(page, 2) == expected and seconds.get_attribute("aria-sort") == order
    # of equal acceptance, and the one without any last, either way
    for expected in (["0.50", "1.00", ""], ["1.00", "0.50", ""]):
        click(page, "#problems th:nth-child(7) button")
        assert shown(page, 6) == expected
    assert seconds.get_attribute("aria-sort") == "none"
    choose(page, "setting", "ar, k = 0")
    assert shown(page, 1) == ["ar, k = 0"] * 3
    choose(page, "setting", "all")
    assert len(shown(page, 0)) == 9
    find = page.find_element("id", "find")
    find.send_keys("cpu/2")
    assert shown(page, 0) == ["cpu/2"] * 3
    assert page.find_element("id", "count").text == "3 of 9 rows"
    find.clear()
    find.send_keys('< 2 & "3"</B>')  # in the answers; case doesn't count
    assert sorted(shown(page, 0)) == ["cpu/0", "cpu/0", "cpu/1", "cpu/1"]
    click(page, "#figures th:nth-child(4) button")
    script = (
        "return [...document.querySelectorAll('#figures td:nth-child(4)')].map((c) => +c.innerText)"
    )
    speeds = page.execute_script(script)
    assert speeds == sorted(speeds) and len(speeds) == 3


def test_plots_can_be_pointed_at(page):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.support.ui import WebDriverWait

    point = page.find_element("css selector", "#seconds_per_pass .points path:last-of-type")
    ActionChains(page).move_to_element(point).perform()
    label = WebDriverWait(page, 10).until(
        lambda page: page.find_element("css selector", "#seconds_per_pass .hovertext")
    )
    assert "two-step" in label.text
    plots = page.find_elements("class name", "js-plotly-plot")
    assert {plot.get_attribute("id") for plot in plots} == PLOTS


def test_it_reads_on_a_phone_in_the_dark_and_on_paper(page):
    background = "return getComputedStyle(document.body).backgroundColor"
    assert page.execute_script(background) == "rgb(255, 255, 255)"
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": dark})
    assert page.execute_script(background) == "rgb(13, 17, 23)"
    size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page.refresh()
    click(page, "#problems tbody:not([hidden]) button")
    assert page.execute_script("return document.documentElement.scrollWidth") <= 360
    for box in (".pair", ".js-plotly-plot svg", "#find"):
        right = page.execute_script(
            "return document.querySelector(arguments[0]).getBoundingClientRect().right",
            "tr:not([hidden]) .pair" if box == ".pair" else box,
        )
        assert 0 < right <= 360, box
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": dark})
    assert page.execute_script(background) == "rgb(255, 255, 255)"
    assert not page.find_element("id", "find").is_displayed()
    assert page.execute_cdp_cmd("Page.printToPDF", {})["data"].startswith("JVBERi")  # %PDF


def test_runs_are_compared_and_one_without_texts_says_so(browser, folder, tmp_path):
    """The same with another worker's name and no texts, as of an older version, beside it."""
    old = tmp_path / "old"
    old.mkdir()
    held = read_json(folder / "worker_cpu.json")
    write_json(old / "worker_0.json", {**held, "device": "0"})
    summary = read_json(folder / "summary.json")
    write_page(
        [read_results(each, summary) for each in (folder, old)], tmp_path / "comparison.html"
    )
    page = opened(browser, tmp_path / "comparison.html")
    notes = [note.text for note in page.find_elements("class name", "no-texts")]
    assert len(notes) == 1 and notes[0].startswith(f"{old}: the texts are not there.")
    assert page.find_element("css selector", "#figures td").text == str(folder)
    assert shown(page, 1) == [str(folder)] * 3 + [str(old)] * 3
    assert shown(page, 2) == ["cpu"] * 3 + ["0"] * 3
    choose(page, "setting", "all")
    choose(page, "run", str(folder))
    assert set(shown(page, 1)) == {str(folder)} and len(shown(page, 1)) == 9
    choose(page, "run", str(old))
    assert set(shown(page, 1)) == {str(old)}
    legend = page.find_element("css selector", "#tokens_per_second .legend").text
    assert str(folder) in legend and str(old) in legend
