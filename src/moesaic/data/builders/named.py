"""The corpora that have a name, as recipes: what is read, how it is cleaned, how it is split."""

from pydantic import Field

from moesaic.core.config import Config
from moesaic.core.errors import DataError, nearest
from moesaic.data.builders.catalogues import Catalogues
from moesaic.data.builders.ddtp import Descriptions
from moesaic.data.builders.debian import Debian
from moesaic.data.builders.extract import Extract
from moesaic.data.builders.files import Files
from moesaic.data.builders.firefox import Firefox
from moesaic.data.builders.office_help import OfficeHelp
from moesaic.data.builders.packages import Package
from moesaic.data.builders.source import Source
from moesaic.data.builders.synthetic import Synthetic
from moesaic.data.builders.together import Together
from moesaic.data.clean import Clean
from moesaic.data.near import DropNear
from moesaic.data.split import Domain, Split

# Every source a recipe may name: importing its module is what makes it a member of the family.
SOURCES = (
    *(Catalogues, Debian, Descriptions, Extract, Files, Firefox, OfficeHelp, Synthetic, Together),
)
_SMALL = (
    Package(name="django", version="5.2.19"),
    Package(name="wagtail", version="8.0.1"),
    Package(name="django-cms", version="5.1.3"),
    Package(name="mezzanine", version="6.1.1"),
)
_LARGE = (
    Package(name="weblate", version="2026.10.1"),
    Package(name="gramps", version="6.0.8"),
    Package(name="pretix", version="2026.8.0"),
    Package(name="picard", version="3.0.2"),
    Package(name="kolibri", version="0.19.5"),
    Package(name="plone-app-locales", version="7.0.4", catalogues="po"),
)


class CorpusRecipe(Config):
    """Everything that decides what a corpus holds. Two equal recipes build the same corpus.

    ``languages`` (codes) restricts it, empty means all; a direction with fewer than ``min_pairs``
    is left out; ``names`` of languages may be any spelling.
    """

    name: str = Field(pattern=r"^[\w.-]+$")
    source: Source
    clean: Clean = Clean()
    split: Split = Split()
    languages: tuple[str, ...] = ()
    min_pairs: int = Field(default=1, ge=1)


def named_recipe(name: str) -> CorpusRecipe:
    """Return a corpus by name. Raises DataError with the nearest name."""
    if name not in NAMED:
        known = ", ".join(NAMED)
        raise DataError(f'unknown corpus "{name}": expected one of {known}{nearest(name, NAMED)}')
    return NAMED[name]


NAMED: dict[str, CorpusRecipe] = {
    recipe.name: recipe
    for recipe in (
        CorpusRecipe(name="synthetic", source=Synthetic()),
        CorpusRecipe(name="catalogues-small", source=Catalogues(packages=_SMALL), min_pairs=200),
        CorpusRecipe(
            name="catalogues",
            source=Catalogues(packages=_SMALL + _LARGE),
            split=Split(near=DropNear()),
            min_pairs=200,
        ),
        CorpusRecipe(
            name="software-171",
            source=Together(
                sources=(
                    Catalogues(packages=_SMALL + _LARGE),
                    Debian(),
                    Firefox(),
                    OfficeHelp(),
                    Descriptions(),
                )
            ),
            split=Split(
                test=0.02,
                valid=0.01,
                near=DropNear(),
                domains=(Domain(name="wesnoth", packages=("wesnoth-1.16-data",)),),
            ),
            min_pairs=200,
        ),
    )
}
