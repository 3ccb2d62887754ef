"""Counting parameters and memory compiles and probes no kernel, on any machine."""

import json

import pytest

from moesaic.cli.main import main
from moesaic.ops import kernel_selection


@pytest.mark.parametrize(
    "words",
    [
        ["explain", "tiny"],
        ["scale", "tiny", "--world-size", "8", "--micro-batch", "1x8+8"],
    ],
)
def test_an_estimate_compiles_nothing(words, monkeypatch, capsys):
    def compiled(*_, **__):
        raise AssertionError("a kernel was compiled or probed")

    for name in ("load_library", "_triton_kernel", "_grouped_mm_failure"):
        monkeypatch.setattr(kernel_selection, name, compiled)
    with pytest.raises(SystemExit) as end:
        main([*words, "--json"])
    assert not end.value.code
    assert json.loads(capsys.readouterr().out)["bytes"]["activations"] > 0
