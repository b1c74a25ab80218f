"""grpo_report.html as a browser shows it: Debian's Chromium, without a window and from disk."""

import json
import math
import re
import shutil
import sys

import pytest
from conftest import ROOT
from processes import finish, read_metrics
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By

sys.path.insert(0, str(ROOT / "docs"))
import screenshot

from engine.files import COMPLETIONS_FILE, METRICS_FILE
from engine.problems import LOGPROBS
from engine.report import REPORT_FILE
from plot_metrics import main

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
    """The folder of a short run of the bundled model with its report."""
    folder = tmp_path_factory.mktemp("run")
    finish(folder, "--num_iterations", 6, "--num_generations", 16, "--max_new_tokens", 16)
    assert main([str(folder / METRICS_FILE)]) == 0
    return folder


def logged(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / COMPLETIONS_FILE).read_text().splitlines()]


@pytest.fixture
def page(browser, run):
    """The browser, on the report of the run. Whatever a test does with it, nothing is fetched."""
    open_page(browser, run)
    yield browser
    assert_silent(browser)


def open_page(browser, folder) -> None:
    screenshot.set_size(browser, 1200)
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # which forgets what was before
    browser.get((folder / REPORT_FILE).as_uri())


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


def test_slider_and_arrow_keys_walk_through_the_groups(page, run):
    lines = logged(run)
    slider = page.find_element(By.ID, "slider")
    assert text(page, "#at") == "1" and text(page, "#question") == lines[0]["question"]
    slider.send_keys(Keys.ARROW_RIGHT)
    assert text(page, "#at") == "2" and slider.get_attribute("aria-valuetext") == "iteration 2"
    page.execute_script("document.activeElement.blur()")
    ActionChains(page).send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT).perform()
    assert text(page, "#at") == "3" and text(page, "#question") == lines[2]["question"]
    assert text(page, "#answer") == str(lines[2]["answer"])
    counts = [int(b.text.split()[0]) for b in page.find_elements(By.CSS_SELECTOR, "#list li b")]
    texts = [
        "".join(shown(token) for token in li.find_elements(By.CLASS_NAME, "token"))
        for li in page.find_elements(By.CSS_SELECTOR, "#list li")
    ]
    found = ["".join(row["token_texts"]) for row in lines[2]["completions"]]
    assert dict(zip(texts, counts, strict=True)) == {t: found.count(t) for t in found}
    cursors = page.find_elements(By.CSS_SELECTOR, "line.cursor")
    assert len(cursors) == 7 and len({cursor.get_attribute("x1") for cursor in cursors}) == 1
    asked = sum((fixed["completions"] for fixed in lines[2]["fixed"]), [])
    answers = page.find_elements(By.CSS_SELECTOR, "#fixed li .text")
    assert [shown(answer) for answer in answers] == [c["text"] for c in asked]
    counts = page.find_elements(By.CSS_SELECTOR, "#fixed li > span:first-child")
    expected = [f"{c['count']} {'✓' if c['exact'] else '✗'}" for c in asked]
    assert [count.text for count in counts] == expected


def test_a_token_shows_its_numbers(page, run):
    rows = logged(run)[0]["completions"]
    item = page.find_element(By.CSS_SELECTOR, "#list li")
    tokens = item.find_elements(By.CSS_SELECTOR, ".token")
    texts = [shown(token) for token in tokens]
    row = next(row for row in rows if row["token_texts"] == texts)
    assert row["advantage"] == max(row["advantage"] for row in rows)  # the best comes first

    def check(i: int) -> None:
        sampled, updated, ref = (row[name][i] for name in LOGPROBS)
        told = text(page, "#readout")
        assert json.dumps(texts[i]) in told
        shares = [float(number) / 100 for number in re.findall(r"([\d.]+)%", told)]
        assert shares == pytest.approx([math.exp(x) for x in (sampled, updated, ref)], rel=1e-2)
        ratio, kl, advantage = re.search(
            r"ratio (\S+) KL term (\S+) advantage (\S+)", told
        ).groups()
        assert float(ratio) == pytest.approx(math.exp(updated - sampled), abs=1e-4)
        expected = math.exp(ref - sampled) - (ref - sampled) - 1
        assert float(kl) == pytest.approx(expected, rel=1e-2, abs=1e-7)
        assert float(advantage.replace("−", "-")) == pytest.approx(row["advantage"], abs=6e-3)

    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", item)
    ActionChains(page).move_to_element(tokens[1]).perform()
    check(1)
    page.execute_script("arguments[0].focus()", tokens[0])
    check(0)
    ActionChains(page).send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT).perform()
    check(2)
    assert text(page, "#at") == "1"  # the arrow keys stayed with the tokens


def test_the_tree_has_branches_as_wide_as_their_share(page, run):
    rows = [row["token_texts"] for row in logged(run)[0]["completions"]]
    tree, box = page.find_element(By.ID, "tree"), page.find_element(By.ID, "list")
    assert not tree.is_displayed() and box.is_displayed()
    choose_view(page, "tree")
    assert tree.is_displayed() and not box.is_displayed()
    unit = float(tree.find_element(By.TAG_NAME, "svg").get_attribute("height")) - 2
    heights = {}
    for branch in tree.find_elements(By.TAG_NAME, "g"):
        label = branch.get_attribute("aria-label")
        count = int(re.search(r": (\d+) of 16 completions", label)[1])
        rect = branch.find_element(By.TAG_NAME, "rect")
        assert float(rect.get_attribute("height")) == pytest.approx(unit * count / 16)
        left = float(rect.get_attribute("x"))
        heights[left] = heights.get(left, 0) + count
    assert heights[1] == 16
    leaves = {tuple(row) for row in rows}
    assert len(tree.find_elements(By.TAG_NAME, "g")) >= len(leaves) > 1
    branch = tree.find_element(By.TAG_NAME, "g")
    ActionChains(page).move_to_element(branch).perform()
    assert text(page, "#readout") == branch.get_attribute("aria-label")


def test_a_curve_reads_the_iteration_under_the_pointer(page, run):
    chart = page.find_element(By.CSS_SELECTOR, "#curves svg")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    ActionChains(page).move_to_element(chart).perform()  # LEFT + RIGHT = 390 of 360: behind 3
    reward = read_metrics(run)["iterations"][2]["reward"]
    told = re.search(r"this iteration (\S+)", text(page, "#curves figcaption"))[1]
    assert float(told) == pytest.approx(reward, rel=6e-3)
    ActionChains(page).click().perform()
    assert text(page, "#at") == "3"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_contrasts_with_what_is_behind_it(page, scheme):
    feature = {"name": "prefers-color-scheme", "value": scheme}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    mixes = [f"color-mix(in srgb, var(--{end}) 45%, var(--line))" for end in ("good", "bad")]
    pairs = [("ink", f"var(--{name})") for name in ("page", "panel", "unlikely")]
    pairs += [("soft", "var(--page)"), ("soft", "var(--panel)"), *(("ink", mix) for mix in mixes)]
    paint = """const probe = document.body.appendChild(document.createElement("i"));
        const dot = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
        const rgb = (colour) => {
          probe.style.color = colour;
          dot.fillStyle = getComputedStyle(probe).color;
          dot.fillRect(0, 0, 1, 1);
          return [...dot.getImageData(0, 0, 1, 1).data];
        };
        return arguments[0].map(([text, back]) => [rgb(`var(--${text})`), rgb(back)]);"""

    def luminance(rgb: list[int]) -> float:
        parts = [c / 255 for c in rgb[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for pair, colours in zip(pairs, page.execute_script(paint, pairs), strict=True):
        dark, light = sorted(map(luminance, colours))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, pair  # WCAG AA
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.parametrize("view", ["list", "tree"])
def test_nothing_scrolls_sideways_at_400_pixels(page, view):
    screenshot.set_size(page, 400)
    choose_view(page, view)
    width = page.execute_script("return document.documentElement.scrollWidth")
    assert width <= 400


def test_what_a_model_says_is_shown_and_never_run(browser, run, tmp_path):
    group, *_ = logged(run)
    row = group["completions"][0] | {"text": HOSTILE, "token_texts": [HOSTILE], "advantage": 9.0}
    row |= {name: [-0.5] for name in LOGPROBS}
    group |= {"question": HOSTILE, "answer": HOSTILE, "completions": [row]}
    group["fixed"] = [{**group["fixed"][0], "question": HOSTILE}]
    group["fixed"][0]["completions"] = [{"text": HOSTILE, "count": 16, "exact": False}]
    (tmp_path / COMPLETIONS_FILE).write_text(json.dumps(group) + "\n")
    metrics = read_metrics(run)
    example = {"question": HOSTILE, "completion": HOSTILE, "exact": True}
    metrics["evaluations"][0]["example"] = example
    metrics["config"]["system_prompt"] = HOSTILE
    (tmp_path / METRICS_FILE).write_text(json.dumps(metrics))
    assert main([str(tmp_path / METRICS_FILE)]) == 0
    open_page(browser, tmp_path)
    for view in ("tree", "list"):
        choose_view(browser, view)
    ActionChains(browser).move_to_element(browser.find_element(By.CLASS_NAME, "token")).perform()
    for selector in ("#question", "#answer", "#list", "#fixed h3", "#fixed ul", "#examples"):
        assert HOSTILE in text(browser, selector), selector
    assert HOSTILE in text(browser, "#config") and "onerror" in text(browser, "#readout")
    assert browser.title == "GRPO: tiny_model" and not browser.find_elements(By.TAG_NAME, "img")
    assert_silent(browser)


def test_runs_of_older_code_and_several_runs_are_shown(browser, run, tmp_path):
    older = ROOT / "results/healthy/good"
    assert main([str(older / METRICS_FILE), "--output_dir", str(tmp_path)]) == 0
    open_page(browser, tmp_path)
    assert "<answer>" in text(browser, "#list")
    assert not browser.find_element(By.ID, "views").is_displayed()
    assert not browser.find_element(By.ID, "fixed").is_displayed()
    assert_silent(browser)
    both = [str(folder / METRICS_FILE) for folder in (run, older)]
    assert main([*both, "--output_dir", str(tmp_path)]) == 0
    open_page(browser, tmp_path)
    assert text(browser, "h1") == "2 GRPO runs"
    assert len(browser.find_elements(By.CSS_SELECTOR, "#curves path")) == 10
    assert not browser.find_element(By.ID, "replay").is_displayed()
    assert_silent(browser)
