import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moesaic.checkpoint.routes_file import RoutesFile, RoutesWriter
from moesaic.core.errors import CheckpointError, DataError
from moesaic.moe.routing import Routing
from moesaic.moe.routing_record import LayerRoutes, RoutedTokens

LANGUAGES = ("deu_Latn", "ell_Grek")


def batch(seed, *, tokens=7, experts=5, k=2, irregular=True):
    """An encoder layer of k edges per token, some dropped, and a decoder layer of any number."""
    make = torch.Generator().manual_seed(seed)

    def ints(high, n):
        return torch.randint(high, (n,), generator=make)

    encoder_tokens = RoutedTokens(
        ints(60_000, tokens), ints(2_000, tokens), ints(3, tokens), ints(2, tokens)
    )
    decoder_tokens = RoutedTokens(*(ints(99, tokens + 2) for _ in range(3)), ints(2, tokens + 2))
    expert = torch.randint(experts + 1, (tokens, k), generator=make)
    weight = torch.where(expert == experts, 0.0, torch.rand(tokens, k, generator=make))
    routes = [
        LayerRoutes(
            "encoder.1",
            Routing.from_topk(weight, expert=expert, num_experts=experts),
            encoder_tokens,
            num_null_experts=1,
        )
    ]
    if irregular:
        edges = 4 + seed
        some = Routing(ints(tokens + 2, edges), ints(3, edges), torch.rand(edges), tokens + 2, 3)
        routes.append(LayerRoutes("decoder.0", some, decoder_tokens))
    return tuple(routes)


def written(path, *batches, **about):
    with RoutesWriter(path, languages=LANGUAGES, about=about) as file:
        for routes in batches:
            file.add(routes)
    return RoutesFile(path)


def same(left, right):
    assert (left.layer, left.num_null_experts) == (right.layer, right.num_null_experts)
    assert left.tokens.equal(right.tokens)
    assert torch.equal(left.tokens.language, right.tokens.language)
    one, other = left.routing, right.routing
    assert torch.equal(one.token, other.token)
    assert torch.equal(one.expert, other.expert)
    assert torch.equal(one.weight, other.weight.half().float())
    assert (one.num_tokens, one.num_experts, one.per_token) == (
        other.num_tokens, other.num_experts, other.per_token,
    )  # fmt: skip


def test_what_was_written_is_read_back_batch_by_batch(tmp_path):
    batches = [batch(0), batch(1, tokens=1), batch(2, tokens=0), batch(3, tokens=40)]
    file = written(tmp_path / "a.routes", *batches, run="demo")
    assert (len(file), file.languages, file.about) == (4, LANGUAGES, {"run": "demo"})
    for read, routes in zip(file, batches, strict=True):
        for one, other in zip(read, routes, strict=True):
            same(one, other)
    assert next(iter(file))[0].routing.weight.dtype == torch.float32


def test_weights_keep_eleven_bits(tmp_path):
    (routes,) = batch(0, tokens=500, irregular=False)
    ((read,),) = written(tmp_path / "a.routes", (routes,))
    kept = routes.routing.weight > 2**-14  # below, float16 has fewer bits
    error = (read.routing.weight - routes.routing.weight).abs()[kept]
    assert (error <= routes.routing.weight[kept] * 2**-11).all()


@pytest.mark.parametrize(("experts", "bytes_"), [(255, 1), (256, 2), (30_000, 2)])
def test_an_expert_takes_as_few_bytes_as_its_number_needs(tmp_path, experts, bytes_):
    routes = batch(0, experts=experts, irregular=False)
    dropped = routes[0].routing.drop(torch.arange(14) < 3)
    routes = (LayerRoutes("encoder.1", dropped, routes[0].tokens),)
    ((read,),) = written(tmp_path / "a.routes", routes)
    assert torch.equal(read.routing.expert, dropped.expert)
    with safe_open(tmp_path / "a.routes", framework="pt") as file:
        assert file.get_tensor("edges/encoder.1/expert").element_size() == bytes_


def test_nothing_is_seen_before_the_end_and_nothing_is_left_after_a_failure(tmp_path):
    def fail():
        with RoutesWriter(tmp_path / "a.routes", languages=LANGUAGES) as file:
            file.add(batch(0))
            assert not (tmp_path / "a.routes").exists()
            raise RuntimeError("full")

    with pytest.raises(RuntimeError, match="full"):
        fail()
    assert list(tmp_path.iterdir()) == []
    written(tmp_path / "a.routes", batch(0))
    assert [p.name for p in tmp_path.iterdir()] == ["a.routes"]


def test_a_file_without_a_batch_is_a_file(tmp_path):
    assert list(written(tmp_path / "a.routes")) == []


def test_batches_of_other_layers_are_refused(tmp_path):
    with RoutesWriter(tmp_path / "a.routes", languages=LANGUAGES) as file:
        file.add(batch(0))
        with pytest.raises(DataError, match="first one had encoder"):
            file.add(batch(0, irregular=False))
        with pytest.raises(DataError, match="6 experts"):
            file.add(batch(0, experts=6))


def test_what_is_no_routes_file_is_named(tmp_path):
    path = tmp_path / "a.routes"
    with pytest.raises(CheckpointError, match="no such file"):
        RoutesFile(path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(DataError, match="but no routes file"):
        RoutesFile(path)
    save_file({"a": torch.zeros(2)}, path, metadata={"moesaic_routes": "7", "routes": "{}"})
    with pytest.raises(DataError, match="version 7"):
        RoutesFile(path)
    save_file({"a": torch.zeros(2)}, path, metadata={"moesaic_routes": "1", "routes": "{}"})
    with pytest.raises(DataError, match="languages: missing"):
        RoutesFile(path)
    head = {"languages": ["a"], "about": {}, "batches": 1, "layers": [
        {"layer": "encoder.0", "experts": 4, "spare": 0, "per_token": 1}
    ]}  # fmt: skip
    metadata = {"moesaic_routes": "1", "routes": json.dumps(head)}
    save_file({"a": torch.zeros(2)}, path, metadata=metadata)
    with pytest.raises(DataError, match=r"edges/encoder.0/ends is missing"):
        list(RoutesFile(path))
    written(path, batch(0))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="truncated"):
        RoutesFile(path)
