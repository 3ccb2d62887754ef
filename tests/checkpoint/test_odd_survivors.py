"""What a crash or a person may leave in a folder of checkpoints."""

from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_samples import snapshot

from moesaic.checkpoint.checkpoint_directory import list_checkpoints
from moesaic.checkpoint.full_checkpoint import find_latest_checkpoint, save_checkpoint
from moesaic.checkpoint.manifest import Manifest, read_manifest
from moesaic.core.errors import CheckpointError
from moesaic.core.file_reader import FileEntry


def best_is_a_directory(root: Path) -> None:
    (root / "best").unlink()
    (root / "best").mkdir()
    (root / "best" / "mine").write_text("x")


def latest_is_a_directory(root: Path) -> None:
    (root / "latest").unlink()
    (root / "latest").mkdir()


def best_is_binary(root: Path) -> None:
    (root / "best").write_bytes(b"\xff" * 9_000)


def next_step_is_a_dangling_link(root: Path) -> None:
    (root / "step-00000003").symlink_to("nowhere")


def next_step_is_a_file(root: Path) -> None:
    (root / "step-00000003").write_text("x")


@pytest.mark.parametrize(
    "leave",
    [best_is_a_directory, latest_is_a_directory, best_is_binary, next_step_is_a_dangling_link,
     next_step_is_a_file],
)  # fmt: skip
def test_saving_goes_on_beside_what_is_no_checkpoint(
    tmp_path: Path, leave: Callable[[Path], None]
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, snapshot(step=step), keep=2, best=True)
    leave(tmp_path)
    assert find_latest_checkpoint(tmp_path).path == tmp_path / "step-00000002"
    save_checkpoint(tmp_path, snapshot(step=3), keep=2, best=True)
    assert find_latest_checkpoint(tmp_path).path == tmp_path / "step-00000003"
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000002"]
    assert (tmp_path / "best").read_text() == "step-00000003\n"


def dangling_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to("zzz.safetensors")


def extra_dangling_link(path: Path) -> None:
    (path / "manifest.json").unlink()
    (path / "other.safetensors").symlink_to("zzz.safetensors")


def weights_are_a_directory(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").mkdir()


def manifest_is_a_directory(path: Path) -> None:
    (path / "manifest.json").unlink()
    (path / "manifest.json").mkdir()


@pytest.mark.parametrize(
    "damage",
    [dangling_weights, extra_dangling_link, weights_are_a_directory, manifest_is_a_directory],
)
def test_resuming_takes_the_checkpoint_before_and_says_why(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, snapshot(step=step))
    damage(tmp_path / "step-00000002")
    found = find_latest_checkpoint(tmp_path)
    assert found.path == tmp_path / "step-00000001"
    assert "step-00000002" in " ".join(found.skipped)


def test_a_manifest_may_not_name_files_outside(tmp_path: Path) -> None:
    for name in ("/etc/passwd", "../../x", "a\0b"):
        entry = FileEntry(bytes=1, sha256="0" * 64)
        (tmp_path / "manifest.json").write_text(
            Manifest(step=1, serial=1, files={name: entry}, versions={}).to_json()
        )
        with pytest.raises(CheckpointError, match=r"found .*expected"):
            read_manifest(tmp_path)
