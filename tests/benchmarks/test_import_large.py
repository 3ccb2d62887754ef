from import_large import MIXTRAL, SMALL, Gauge
from sparse_checkpoint import write_sparse_checkpoint

from moesaic.exchange.import_model import import_model


def test_an_import_needs_three_times_the_largest_tensor_at_most(tmp_path):
    config = MIXTRAL | SMALL | {"num_hidden_layers": 4}
    about = write_sparse_checkpoint(tmp_path / "theirs", config, layout="fused")
    assert about["bytes"] > 6 * about["largest_tensor"]
    gauge = Gauge()
    gauge.start()
    import_model(tmp_path / "theirs", out=tmp_path / "ours")
    assert gauge.stop() <= 3 * about["largest_tensor"]
