"""Train a translator in Python from a recipe (synthetic languages, half a minute)."""

import tempfile
from pathlib import Path

import moesaic

run = moesaic.recipe("tiny", changes=["steps=60", "model.moe.experts=8"])
count = moesaic.count_parameters(run.model)
print(f"{count.total:,} parameters, {count.active:,} active per token")

out = Path(tempfile.mkdtemp()) / "tiny"
result = moesaic.fit(run, out)
print(f"loss {result.metrics['train/loss']:.2f} after {result.tokens:,} tokens")

translator = moesaic.Translator.open(out)
texts = ["Open the new folder here", "Delete the hidden page now"]
for text, translation in zip(
    texts, translator.translate(texts, source="en", target="qab"), strict=True
):
    print(f"{text} -> {translation.text}  ({translation.score:.2f})")
