"""The report's page in a browser: it draws everything, asks the network for nothing, fits a phone.

Screenshots lie in the folder that the variable REPORT_SCREENSHOTS names, else in pytest's.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from run_folders import HOSTILE, make_all, make_run

from reports import write_report

pytestmark = pytest.mark.browser
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
SIZES = "places => places.map(place => place.querySelector('svg')?.getBoundingClientRect().width)"

MARKS = """places => places.map(place => [...place.querySelectorAll(
    ".mark-symbol path, .mark-line path, .mark-rect path, .mark-image image"
)].map(mark => mark.getBoundingClientRect()).filter(box => box.width + box.height > 2).length)
"""


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report over two data sets, two devices, a broken run and a hostile name."""
    root = tmp_path_factory.mktemp("runs")
    make_all(root, paper={"source": "table 2", "test_acc": {"full": 0.9}})
    make_run(root / "msdnet/cifar/seed0", "msdnet", data="CIFAR10", gpu="H200", accelerator="gpu")
    make_run(root / "slimmable/cifar/seed0", "slimmable", data="CIFAR10", epochs=300)
    make_run(root / HOSTILE.replace("/", "_") / "x/seed0", "densenet", points=[HOSTILE])
    broken = make_run(root / "resnet/broken/seed0", "resnet")
    (broken / "config.yaml").write_text("a: [")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reports.report.png", lambda figure: b"")
        return write_report([root], tmp_path_factory.mktemp("out") / "report")[0]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail("there is no chromium to look at the page with: install Debian's package of it")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """A page that was opened and scrolled through, and what happened meanwhile."""

    def __init__(self, browser: Browser, index: Path, size: tuple[int, int]):
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, offline=True)
        self.page: Page = context.new_page()
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: self.errors.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(index.as_uri())
        self.page.eval_on_selector_all("details", "all => all.forEach(each => each.open = true)")
        self.charts = self.page.locator(".chart")
        for i in range(self.charts.count()):
            self.charts.nth(i).scroll_into_view_if_needed()
        everything = "document.querySelectorAll('.chart:not([data-drawn])').length == 0"
        self.page.wait_for_function(everything, timeout=120_000)


@pytest.fixture(scope="module", params=WIDTHS)
def visit(request: pytest.FixtureRequest, browser: Browser, index: Path) -> Iterator[Visit]:
    visit = Visit(browser, index, WIDTHS[request.param])
    yield visit
    visit.page.context.close()


def test_nothing_goes_wrong_and_nothing_is_fetched(visit: Visit, index: Path) -> None:
    assert visit.errors == []
    fetched = [url for url in visit.requests if not url.startswith("data:")]
    assert fetched == [index.as_uri()]


def test_every_figure_is_drawn(visit: Visit) -> None:
    widths = visit.charts.evaluate_all(SIZES)
    assert len(widths) > 40
    assert min(widths) > 200
    assert min(visit.charts.evaluate_all(MARKS)) > 0
    titles = visit.page.locator("figcaption b").all_text_contents()
    for title in (
        *("Accuracy against MACs per image", "Accuracy against parameters"),
        *("Accuracy against measured time", "Learning curves: accuracy", "Learning curves: loss"),
        *("Gradient magnitude", "Survival of each block", "Who leaves at each exit"),
        *("Entropy at each exit", "Widths before and after recalibration", "Confusion matrix"),
        "Easiest and hardest images of each exit",
    ):
        assert any(each.startswith(title) for each in titles), title


def test_hover_names_the_point(visit: Visit) -> None:
    chart = visit.page.locator(".chart[data-spec$=accuracy_macs]").first
    chart.evaluate("chart => chart.scrollIntoView({block: 'center'})")  # not below the headline
    points = chart.locator("g.mark-symbol.role-mark path")
    tooltip = visit.page.locator("#vg-tooltip-element.visible")
    seen = []
    for i in range(points.count()):
        points.nth(i).hover(force=True)
        tooltip.wait_for(timeout=120_000)
        seen.append(" ".join(tooltip.inner_text().split()))
    assert len(seen) == 8
    for experiment, point in (("slimmable/cifar", "w0.25"), ("msdnet/cifar", "budget_exit2")):
        start = f"experiment {experiment} point {point} accuracy "
        (words,) = [each for each in seen if each.startswith(start)]
        assert re.search(r"accuracy [\d.]+% .* MACs per image [\d.]+M seeds 0 ", words)


def test_nothing_is_wider_than_the_window(visit: Visit) -> None:
    page, inner = visit.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert page <= inner


def test_screenshots(visit: Visit, tmp_path: Path) -> None:
    folder = Path(os.environ.get("REPORT_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    width = visit.page.viewport_size["width"]
    visit.page.mouse.move(0, 0)
    visit.page.evaluate("window.scrollTo(0, 0)")
    path = folder / f"report_{width}.png"
    visit.page.screenshot(path=path, full_page=True)
    assert path.stat().st_size > 50_000
