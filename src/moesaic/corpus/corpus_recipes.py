"""Corpus recipes: the config of a corpus, and the corpora that have a name."""

from pydantic import Field, model_validator

import moesaic.corpus.sources.document_files
import moesaic.corpus.sources.local_files  # noqa: F401  register their sources
from moesaic.core.config import Config
from moesaic.core.errors import DataError, did_you_mean
from moesaic.corpus.cleaning import CleaningConfig
from moesaic.corpus.sources.debian_descriptions import DebianDescriptions
from moesaic.corpus.sources.firefox import FirefoxMessages
from moesaic.corpus.sources.gettext_catalogues import DebianCatalogues, PyPICatalogues
from moesaic.corpus.sources.libreoffice_help import LibreOfficeHelp
from moesaic.corpus.sources.package_archives import PyPIPackage
from moesaic.corpus.sources.synthetic import SyntheticLanguages
from moesaic.corpus.sources.text_source import CombinedSources, TextSource
from moesaic.corpus.split import DropNearDuplicates, HeldOutDomain, SplitConfig
from moesaic.corpus.text_rules import SoftwareStrings

_SMALL_PACKAGES = (
    PyPIPackage(name="django", version="5.2.19"),
    PyPIPackage(name="wagtail", version="8.0.1"),
    PyPIPackage(name="django-cms", version="5.1.3"),
    PyPIPackage(name="mezzanine", version="6.1.1"),
)
_LARGE_PACKAGES = (
    PyPIPackage(name="weblate", version="2026.10.1"),
    PyPIPackage(name="gramps", version="6.0.8"),
    PyPIPackage(name="pretix", version="2026.8.0"),
    PyPIPackage(name="picard", version="3.0.2"),
    PyPIPackage(name="kolibri", version="0.19.5"),
    PyPIPackage(name="plone-app-locales", version="7.0.4", catalogues="po"),
)


# the named corpora hold strings of programs, or imitate them
# tags are copied like other placeholders
_CLEAN_SOFTWARE = CleaningConfig(text_rules=SoftwareStrings(tags="keep"))


class CorpusRecipe(Config):
    """The config of a corpus. Two equal recipes build the same corpus.

    ``languages``, in any spelling, restricts it; empty means all. A direction with fewer than
    ``min_pairs`` pairs is left out. Where ``clean`` names no text rules, they are those of the
    source: ``DocumentText`` of documents, ``GeneralText`` of any other.
    """

    name: str = Field(max_length=100, pattern=r"^[\w-][\w.-]*$")
    source: TextSource
    clean: CleaningConfig = CleaningConfig()
    split: SplitConfig = SplitConfig()
    languages: tuple[str, ...] = ()
    min_pairs: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _take_text_rules_of_the_source(self) -> "CorpusRecipe":
        rules = self.source.default_text_rules
        if "text_rules" in self.clean.model_fields_set or rules == self.clean.text_rules:
            return self
        # a validator of a frozen value has no other way to complete it
        object.__setattr__(self, "clean", self.clean.replace(text_rules=rules))
        return self


def named_corpus(name: str) -> CorpusRecipe:
    """Return the recipe of a named corpus. Raises DataError with the nearest name."""
    if name not in NAMED_CORPORA:
        known = ", ".join(NAMED_CORPORA)
        raise DataError(
            f'unknown corpus "{name}": expected one of {known}{did_you_mean(name, NAMED_CORPORA)}'
        )
    return NAMED_CORPORA[name]


NAMED_CORPORA: dict[str, CorpusRecipe] = {
    recipe.name: recipe
    for recipe in (
        CorpusRecipe(name="synthetic", source=SyntheticLanguages(), clean=_CLEAN_SOFTWARE),
        CorpusRecipe(
            name="catalogues-small",
            source=PyPICatalogues(packages=_SMALL_PACKAGES),
            clean=_CLEAN_SOFTWARE,
            min_pairs=200,
        ),
        CorpusRecipe(
            name="catalogues",
            source=PyPICatalogues(packages=_SMALL_PACKAGES + _LARGE_PACKAGES),
            clean=_CLEAN_SOFTWARE,
            split=SplitConfig(near_duplicates=DropNearDuplicates()),
            min_pairs=200,
        ),
        CorpusRecipe(
            name="software-171",
            source=CombinedSources(
                sources=(
                    PyPICatalogues(packages=_SMALL_PACKAGES + _LARGE_PACKAGES),
                    DebianCatalogues(),
                    FirefoxMessages(),
                    LibreOfficeHelp(),
                    DebianDescriptions(),
                )
            ),
            clean=_CLEAN_SOFTWARE,
            split=SplitConfig(
                test=0.02,
                valid=0.01,
                near_duplicates=DropNearDuplicates(),
                domains=(HeldOutDomain(name="wesnoth", packages=("wesnoth-1.16-data",)),),
            ),
            min_pairs=200,
        ),
    )
}
