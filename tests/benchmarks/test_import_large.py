from import_large import MIXTRAL, SMALL, Gauge
from sparse_checkpoint import write_sparse_checkpoint

from moesaic.exchange.export_model import export_model
from moesaic.exchange.import_model import import_model


def test_import_and_export_need_three_times_the_largest_tensor_at_most(tmp_path):
    config = MIXTRAL | SMALL | {"num_hidden_layers": 4}
    about = write_sparse_checkpoint(tmp_path / "theirs", config, layout="fused")
    assert about["bytes"] > 6 * about["largest_tensor"]
    for task in (
        lambda: import_model(tmp_path / "theirs", out=tmp_path / "ours"),
        lambda: export_model(tmp_path / "ours", out=tmp_path / "again", layout="fused"),
    ):
        gauge = Gauge()
        gauge.start()
        task()
        assert gauge.stop() <= 3 * about["largest_tensor"]
