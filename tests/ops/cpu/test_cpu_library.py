"""The compiled library is cached atomically, and the reason is reported if there is none."""

import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moesaic.ops.cpu import cpu_library
from moesaic.ops.cpu.cpu_library import (
    COMPILERS,
    BuildError,
    build_library,
    cache_directory,
    check_library,
)

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, COMPILERS)), reason="this machine has no C compiler"
)


@pytest.fixture(scope="module", autouse=True)
def _quick_to_compile():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            cpu_library,
            "COMPILER_FLAGS",
            tuple("-O0" if f == "-O3" else f for f in cpu_library.COMPILER_FLAGS),
        )
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    return build_library(cache=tmp_path_factory.mktemp("built"))


@pytest.fixture
def cache(built, tmp_path) -> Path:
    shutil.copy(built, tmp_path / built.name)
    return tmp_path


@needs_compiler
def test_a_cached_library_is_not_compiled_again(cache, built, monkeypatch):
    monkeypatch.setattr(cpu_library, "_compile", lambda *_, **__: pytest.fail("compiled again"))
    assert build_library(cache=cache).name == built.name


@needs_compiler
@pytest.mark.parametrize("fault", ["cut short", "one bit", "empty"])
def test_a_damaged_library_is_made_again(cache, built, fault):
    place, whole = cache / built.name, built.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    place.write_bytes({"cut short": whole[:middle], "one bit": flipped, "empty": b""}[fault])
    made = build_library(cache=cache)
    assert check_library(made).library is not None
    assert [p for p in cache.iterdir() if p.suffix != ".so"] == []


@needs_compiler
def test_two_concurrent_builds_both_get_a_complete_library(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda _: build_library(cache=tmp_path), range(2)))
    for path in made:
        assert check_library(path).library is not None
    assert all(path.suffix == ".so" for path in tmp_path.iterdir())


@needs_compiler
def test_another_source_gets_another_library(cache, built, tmp_path_factory, monkeypatch):
    changed = tmp_path_factory.mktemp("source")
    for path in cpu_library.SOURCE_DIRECTORY.iterdir():
        shutil.copy(path, changed)
    (changed / "moe.c").open("a").write("\n/* changed */\n")
    monkeypatch.setattr(cpu_library, "SOURCE_DIRECTORY", changed)
    assert build_library(cache=cache).name != built.name


def test_without_a_compiler_that_is_the_reason(tmp_path):
    with pytest.raises(BuildError, match="no C compiler"):
        build_library(cache=tmp_path, path=str(tmp_path))


def test_a_compiler_that_fails_is_named(tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text(
        '#!/bin/sh\ntest "$1" = --version && exit 0\necho error: broken >&2; exit 1\n'
    )
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(BuildError, match=r"cc did not compile moe\.c: error: broken"):
        build_library(cache=tmp_path / "cache", path=str(tmp_path))


@needs_compiler
def test_a_cache_that_cannot_be_written_is_no_crash(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="file"):
        build_library(cache=tmp_path / "file" / "cache")


def test_the_cache_is_where_the_user_wants_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "moesaic"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the specification
    assert cache_directory() == Path.home() / ".cache" / "moesaic"
