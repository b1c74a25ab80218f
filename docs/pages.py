"""Rewrite what is generated in the pages, from the committed results.

    python docs/pages.py

In README.md and docs/*.md, a function of tables.py writes what stands between `<!-- NAME -->` and
`<!-- end -->`: a table, or a number in a sentence. figures.py draws docs/*.png, one_iteration.py
writes one_iteration.md; report.html and report.png come from screenshot.py, run by itself. Change
the results or these files, run this, and commit the pages.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import figures
import one_iteration
import tables

from engine.files import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
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


def main() -> None:
    (ROOT / "docs" / "one_iteration.md").write_text(one_iteration.page(), encoding="utf-8")
    for path in PAGES:
        path.write_text(rewrite(path.read_text(encoding="utf-8")), encoding="utf-8")
    figures.draw_figures(ROOT / "docs")
    print(f"wrote {', '.join(path.name for path in PAGES)} and {len(figures.FIGURES)} figures")


if __name__ == "__main__":
    main()
