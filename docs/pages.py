"""Rewrite what is generated in the pages, from the committed results.

    python docs/pages.py

In README.md, docs/*.md and benchmarks/RECORDS.md, a function of tables.py writes what stands
between `<!-- NAME -->` and `<!-- end -->`: a table, or a number in a sentence. figures.py draws
docs/*.png, one_iteration.py writes one_iteration.md. docs/report*.html keep their data and get the
page of engine/report.html; screenshot.py, run by itself, makes the first of them and its picture.
Change the results or these files, run this, and commit the pages.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import figures
import one_iteration
import tables

from engine.files import ROOT
from engine.report import PAGE

REPORTS = sorted((ROOT / "docs").glob("report*.html"))
DATA = re.compile(r'(?<=id="data">).*?(?=</script>)', re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks/RECORDS.md"]
MARKED = re.compile(r"<!-- (\w+) -->(.*?)<!-- end -->", re.DOTALL)


def rewrite(page: str) -> str:
    """The text of a page with everything between markers generated anew."""

    def renew(found: re.Match) -> str:
        name, old = found.groups()
        new = tables.GENERATED[name]()
        if old.startswith("\n"):
            new = f"\n\n{new}\n\n"
        elif old.split() == new.split():
            new = old  # only the line breaks differ
        return f"<!-- {name} -->{new}<!-- end -->"

    return MARKED.sub(renew, page)


def renew_report(report: str) -> str:
    """A committed report in the page as it is today; its data hold no `<`."""
    return PAGE.read_text(encoding="utf-8").replace("{{data}}", DATA.search(report)[0])


def main() -> None:
    (ROOT / "docs" / "one_iteration.md").write_text(one_iteration.page(), encoding="utf-8")
    for path in PAGES:
        path.write_text(rewrite(path.read_text(encoding="utf-8")), encoding="utf-8")
    for path in REPORTS:
        path.write_text(renew_report(path.read_text(encoding="utf-8")), encoding="utf-8")
    figures.draw_figures(ROOT / "docs")
    print(f"wrote {', '.join(path.name for path in PAGES)} and {len(figures.FIGURES)} figures")


if __name__ == "__main__":
    main()
