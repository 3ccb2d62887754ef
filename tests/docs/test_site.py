"""The site's navigation has every page of the guide, of the API and of the decisions, once."""

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
NAVIGATION = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]


def pages(part):
    """Return the pages of a part of the navigation, in order."""
    if isinstance(part, str):
        return [part]
    children = part.values() if isinstance(part, dict) else part
    return [page for child in children for page in pages(child)]


@pytest.mark.parametrize("folder", [".", "guide", "api", "decisions"])
def test_every_page_is_in_the_navigation(folder):
    docs = ROOT / "docs"
    written = {path.relative_to(docs).as_posix() for path in (docs / folder).glob("*.md")}
    listed = pages(NAVIGATION)
    assert written - set(listed) == set()
    assert sorted(listed) == sorted(set(listed))
    assert [page for page in listed if not (docs / page).is_file()] == []
