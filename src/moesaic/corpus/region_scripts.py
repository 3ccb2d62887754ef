"""Regions that decide the script, or the language, of a tag: ``zh-HK`` is Traditional Chinese.

All members of Unicode's likely-subtags table (CLDR 49, as in Babel 2.19) that are a language with a
region and whose script is another than the language's own, and CLDR's aliases of a language to
another language's region. Copyright of the data: Unicode, Inc., under the Unicode License v3.
"""

_SCRIPTS = {
    "abq": {"Latn": "TR"},
    "az": {"Arab": "IQ IR", "Cyrl": "RU"},
    "ha": {"Arab": "CM SD"},
    "hak": {"Hant": "TW"},
    "kk": {"Arab": "AF CN IR MN"},
    "ku": {"Arab": "IQ IR LB", "Cyrl": "AM AZ GE TM"},
    "ky": {"Arab": "CN", "Latn": "TR"},
    "lzz": {"Geor": "GE"},
    "mey": {"Latn": "SN"},
    "mn": {"Mong": "CN"},
    "ms": {"Arab": "CC"},
    "nan": {"Hant": "MO TW"},
    "pa": {"Arab": "PK"},
    "pi": {"Deva": "IN", "Sinh": "LK", "Mymr": "MM", "Thai": "TH"},
    "pnt": {"Cyrl": "RU", "Latn": "TR"},
    "sd": {"Deva": "IN"},
    "sr": {"Latn": "ME RO TR"},
    "stu": {"Tale": "CN"},
    "tg": {"Arab": "PK"},
    "ug": {"Cyrl": "KZ MN"},
    "unr": {"Deva": "NP"},
    "uz": {"Arab": "AF", "Cyrl": "CN"},
    "yue": {"Hans": "CN"},
    "zh": {"Hant": "AU BN GB GF HK ID MO PA PF PH SR TH TW US VN"},
}
SCRIPT_OF_REGION = {
    (language, region): script
    for language, scripts in _SCRIPTS.items()
    for script, regions in scripts.items()
    for region in regions.split()
}
"""(BCP-47 language, region) -> ISO 15924 script."""

LANGUAGE_OF_REGION = {("fa", "AF"): "prs", ("sw", "CD"): "swc"}
"""(BCP-47 language, region) -> the language that has a code of its own there."""
