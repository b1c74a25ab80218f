"""grpo_report.html as a browser shows it: Debian's Chromium, without a window and from disk."""

import json
import math
import re
import shutil
import sys
from collections import Counter
from unittest.mock import patch

import pytest
from conftest import ROOT
from processes import finish, read_metrics
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By

sys.path.insert(0, str(ROOT / "docs"))
import screenshot

import plot_metrics
from engine.files import COMPLETIONS_FILE, METRICS_FILE
from engine.problems import LOGPROBS
from engine.report import REPORT_FILE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="needs a browser: apt-get install chromium chromium-driver",
    ),
]
HOSTILE = "</script><img src=x onerror=\"document.title='hacked'\">"


@pytest.fixture(scope="module")
def browser():
    driver = screenshot.start_browser()
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short run of the bundled model."""
    folder = tmp_path_factory.mktemp("run")
    finish(folder, "--num_iterations", 6, "--num_generations", 16, "--max_new_tokens", 16)
    return folder


@pytest.fixture(scope="module")
def lines(run):
    """The groups that the run has logged."""
    return list(map(json.loads, (run / COMPLETIONS_FILE).read_text().splitlines()))


@pytest.fixture
def page(browser, run):
    """The browser, on the report of the run."""
    screenshot.set_size(browser, 1200)
    open_report(browser, run, run)
    return browser


def open_report(browser, output, *runs) -> None:
    """Write the report of these runs into a folder, and open it."""
    files = [str(run / METRICS_FILE) for run in runs]
    with patch.object(plot_metrics, "save_figure"):
        assert plot_metrics.main([*files, "--output_dir", str(output)]) == 0
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # which forgets what was before
    browser.get((output / REPORT_FILE).as_uri())


def shown(element) -> str:
    """A text of the log, of which the page shows line breaks as a sign."""
    return element.get_attribute("textContent").replace("↵", "\n").replace("∅", "")


def text(browser, selector: str) -> str:
    return browser.find_element(By.CSS_SELECTOR, selector).text


def choose_view(browser, view: str) -> None:
    """Show the group as list or tree. Scrolls, so that nothing covers the choice."""
    choice = browser.find_element(By.CSS_SELECTOR, f"[value={view}]")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", choice)
    choice.click()


def assert_silent(browser) -> None:
    """Nothing in the console, and nothing was asked for but the file itself."""
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    urls = {request["request"]["url"] for request in sent}
    assert urls == {browser.current_url} and browser.current_url.startswith("file://")


def test_slider_and_arrow_keys_walk_through_the_groups(page, lines):
    slider = page.find_element(By.ID, "slider")
    assert text(page, "#at") == "1" and text(page, "#question") == lines[0]["question"]
    slider.send_keys(Keys.ARROW_RIGHT)
    assert text(page, "#at") == "2" and slider.get_attribute("aria-valuetext") == "iteration 2"
    page.execute_script("document.activeElement.blur()")
    ActionChains(page).send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT).perform()
    assert text(page, "#at") == "3" and text(page, "#question") == lines[2]["question"]
    assert text(page, "#answer") == str(lines[2]["answer"])
    found = Counter("".join(row["token_texts"]) for row in lines[2]["completions"])
    items = page.find_elements(By.CSS_SELECTOR, "#list li")
    texts = ["".join(map(shown, item.find_elements(By.CLASS_NAME, "token"))) for item in items]
    counts = [int(item.find_element(By.TAG_NAME, "b").text.split()[0]) for item in items]
    assert dict(zip(texts, counts, strict=True)) == found
    asked = sum((fixed["completions"] for fixed in lines[2]["fixed"]), [])
    answers = page.find_elements(By.CSS_SELECTOR, "#fixed li .text")
    assert [shown(answer) for answer in answers] == [c["text"] for c in asked]
    counts = page.find_elements(By.CSS_SELECTOR, "#fixed li > span:first-child")
    expected = [f"{c['count']} {'✓' if c['exact'] else '✗'}" for c in asked]
    assert [count.text for count in counts] == expected
    assert_silent(page)


def test_a_token_shows_its_numbers(page, lines):
    item = page.find_element(By.CSS_SELECTOR, "#list li")
    tokens = item.find_elements(By.CSS_SELECTOR, ".token")
    texts = list(map(shown, tokens))
    row = next(r for r in lines[0]["completions"] if r["token_texts"] == texts)

    def check(i: int) -> None:
        sampled, updated, ref = (row[name][i] for name in LOGPROBS)
        told = text(page, "#readout")
        assert json.dumps(texts[i]) in told
        shares = [float(number) / 100 for number in re.findall(r"([\d.]+)%", told)]
        assert shares == pytest.approx([math.exp(x) for x in (sampled, updated, ref)], rel=1e-2)
        numbers = re.search(r"ratio (\S+) KL term (\S+) advantage (\S+)", told).groups()
        ratio, kl, advantage = (float(number.replace("−", "-")) for number in numbers)
        assert ratio == pytest.approx(math.exp(updated - sampled), abs=1e-4)
        expected = math.exp(ref - sampled) - (ref - sampled) - 1
        assert kl == pytest.approx(expected, rel=1e-2, abs=1e-7)
        assert advantage == pytest.approx(row["advantage"], abs=6e-3)

    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", item)
    ActionChains(page).move_to_element(tokens[1]).perform()
    check(1)
    page.execute_script("arguments[0].focus()", tokens[0])
    ActionChains(page).send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT).perform()
    check(2)
    assert text(page, "#at") == "1"  # the arrow keys stayed with the tokens
    assert_silent(page)


def test_the_tree_has_branches_as_wide_as_their_share(page, lines):
    tree, box = page.find_element(By.ID, "tree"), page.find_element(By.ID, "list")
    assert not tree.is_displayed() and box.is_displayed()
    choose_view(page, "tree")
    assert tree.is_displayed() and not box.is_displayed()
    unit = float(tree.find_element(By.TAG_NAME, "svg").get_attribute("height")) - 2
    branches = tree.find_elements(By.TAG_NAME, "g")
    for branch in branches:
        count = re.search(r": (\d+) of 16 completions", branch.get_attribute("aria-label"))[1]
        height = branch.find_element(By.TAG_NAME, "rect").get_attribute("height")
        assert float(height) == pytest.approx(unit * int(count) / 16)
    leaves = {tuple(row["token_texts"]) for row in lines[0]["completions"]}
    assert len(branches) >= len(leaves) > 1
    ActionChains(page).move_to_element(branches[0]).perform()
    assert text(page, "#readout") == branches[0].get_attribute("aria-label")
    assert_silent(page)


def test_nothing_scrolls_sideways_at_400_pixels(page):
    screenshot.set_size(page, 400)
    for view in ("list", "tree"):
        choose_view(page, view)
        assert page.execute_script("return document.documentElement.scrollWidth") <= 400


def test_what_a_model_says_is_shown_and_never_run(browser, run, lines, tmp_path):
    row = lines[0]["completions"][0] | {"text": HOSTILE, "token_texts": [HOSTILE]}
    row |= {name: [-0.5] for name in LOGPROBS}
    answer = {"text": HOSTILE, "count": 16, "exact": False}
    fixed = {"question": HOSTILE, "answer": 1, "completions": [answer]}
    group = {"question": HOSTILE, "answer": HOSTILE, "completions": [row], "fixed": [fixed]}
    (tmp_path / COMPLETIONS_FILE).write_text(json.dumps(lines[0] | group) + "\n")
    metrics = read_metrics(run)
    example = {"question": HOSTILE, "completion": HOSTILE, "exact": True}
    metrics["evaluations"][0]["example"] = example
    metrics["config"]["system_prompt"] = HOSTILE
    (tmp_path / METRICS_FILE).write_text(json.dumps(metrics))
    open_report(browser, tmp_path, tmp_path)
    for view in ("tree", "list"):
        choose_view(browser, view)
    ActionChains(browser).move_to_element(browser.find_element(By.CLASS_NAME, "token")).perform()
    for selector in ("#question", "#answer", "#list", "#fixed h3", "#fixed ul", "#examples"):
        assert HOSTILE in text(browser, selector), selector
    assert HOSTILE in text(browser, "#config") and "onerror" in text(browser, "#readout")
    assert browser.title == "GRPO: tiny_model" and not browser.find_elements(By.TAG_NAME, "img")
    assert_silent(browser)


def test_several_runs_and_those_of_older_code_are_shown(browser, run, tmp_path):
    screenshot.set_size(browser, 1200)
    old = ROOT / "results/healthy/good"
    for runs, absent in ([old], ("views", "fixed")), ([old, run], ("replay",)):
        open_report(browser, tmp_path, *runs)
        for part in absent:
            assert not browser.find_element(By.ID, part).is_displayed()
        assert_silent(browser)
    assert text(browser, "h1") == "2 GRPO runs"
