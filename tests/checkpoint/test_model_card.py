import yaml

from moesaic.checkpoint.model_card import DataSource, ModelCard, add_to_card
from moesaic.checkpoint.run_directory import RunDir

CARD = ModelCard(
    name="demo",
    languages=["de", "zh-Hans"],
    licence="GPL-3.0-or-later",
    task="translation",
    parameters={"embedding": (1_000_000, 1_000_000), "experts": (8_000_000, 1_000_000)},
    sources=[DataSource("django|po", "BSD-3-Clause", 12345)],
    scores=[{"language": "deu_Latn", "chrF++": 31.25, "copy": 20.0}],
    facts={"Routing": "top-1 of 8"},
    notes=["Short interface strings only."],
)


def test_the_front_matter_is_yaml_that_a_hub_reads():
    _, front, _ = CARD.text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "language": ["de", "zh-Hans"],
        "license": "gpl-3.0-or-later",
        "library_name": "moesaic",
        "pipeline_tag": "translation",
        "tags": ["moe", "mixture-of-experts", "multilingual"],
        "datasets": ["django|po"],
    }


def test_the_tables_hold_sizes_sources_scores_and_limits():
    text = CARD.text()
    assert "| **all** | **9.00M** | **2.00M** |" in text
    assert "| django\\|po | BSD-3-Clause | 12,345 |" in text
    assert "| deu_Latn | 31.2 | 20.0 |" in text
    assert "- Routing: top-1 of 8" in text
    assert "- Short interface strings only." in text


def test_a_card_without_data_or_scores_has_no_empty_sections():
    card = ModelCard(
        name="x", languages=[], licence="mit", task="other", parameters={"all": (1, 1)}
    )
    assert "## Training data" not in card.text()
    assert "datasets" not in card.text()


def test_a_fact_that_is_added_later_is_the_last_one_of_the_model(tmp_path):
    RunDir(tmp_path).card.write_text(CARD.text())
    add_to_card(tmp_path, "merged", "yes")
    model, _ = RunDir(tmp_path).card.read_text().split("## Training data")
    assert model.endswith("- Routing: top-1 of 8\n- merged: yes\n\n")
