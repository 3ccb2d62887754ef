"""CPU library: compile a C source on this machine, cache it, load it and check its results.

A library is compiled once per source, compiler and CPU. Its file name in the user's cache contains
the hash of its inputs and of its own content, so readers need no lock: a file whose content does
not match is compiled again. It is written to a temporary file and renamed; of two concurrent builds
the later wins.
"""

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch

from moesaic.core.files import sha256 as hash_of_file
from moesaic.ops.cpu.cpu_moe_kernel import CPULibrary, CPUMoEKernel
from moesaic.ops.grouped_gemm import SequentialGEMM
from moesaic.ops.kernel_check import compare_with_unfused
from moesaic.ops.moe_kernel import UnfusedMoEKernel

SOURCE_DIRECTORY = Path(__file__).parent / "source"
COMPILERS = ("cc", "gcc", "clang")
COMPILER_FLAGS = (
    *("-O3", "-std=gnu11", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden"),
    *("-fno-math-errno", "-fno-trapping-math"),
)
# whether products and sums may be fused: each library by the name of its main file
CONTRACTION = {"moe": "-ffp-contract=fast", "adamw": "-ffp-contract=off"}
NATIVE_FLAGS = (("-march=native",), ("-mcpu=native",), ())  # the first that the compiler accepts
COMPILE_TIMEOUT_S = 300.0


class BuildError(Exception):
    """The library cannot be built; the message is the reason."""


def build_library(name: str = "moe", *, cache: Path | None = None, path: str | None = None) -> Path:
    """Return the path of the library of ``name.c``; compile it if it is not in the cache.

    ``cache`` and ``path`` (searched for compilers) default to those of the user. Raises BuildError
    without a compiler, or if none compiles it.
    """
    compilers = [found for name in COMPILERS if (found := shutil.which(name, path=path))]
    if not compilers:
        raise BuildError(f"no C compiler ({', '.join(COMPILERS)}) on the PATH")
    failures = []
    for compiler in dict.fromkeys(os.path.realpath(each) for each in compilers):
        built = _build_with(compiler, name=name, folder=cache or cache_directory())
        if isinstance(built, Path):
            return built
        failures.append(built)
    raise BuildError("; ".join(failures))


def cache_directory() -> Path:
    """``$XDG_CACHE_HOME/moesaic``, or ``~/.cache/moesaic``. Raises BuildError without a home."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "moesaic"
    except RuntimeError as error:
        raise BuildError(
            f"no folder to cache the library in ({error}); set XDG_CACHE_HOME"
        ) from error


def _build_with(compiler: str, *, name: str, folder: Path) -> Path | str:
    """Return the library, or why this compiler does not build it."""
    try:
        stem = f"{name}-{_cache_key(compiler, name=name)}"
        return _cached_library(folder, stem=stem) or _compile_into_cache(
            compiler, folder=folder, stem=stem
        )
    except OSError as error:
        return f"{compiler}: {error}"
    except subprocess.TimeoutExpired:
        return f"{compiler} took longer than {COMPILE_TIMEOUT_S:.0f} s"
    except BuildError as error:
        return str(error)


def _cache_key(compiler: str, *, name: str) -> str:
    """Return the hash of everything that the content of the library depends on."""
    parts = [path.read_bytes() for path in sorted(SOURCE_DIRECTORY.iterdir())]
    flags = (*COMPILER_FLAGS, CONTRACTION[name])
    parts += [text.encode() for text in (*flags, _compiler_version(compiler), _cpu_description())]
    return sha256(b"\0".join(parts)).hexdigest()[:16]


def _compiler_version(compiler: str) -> str:
    done = _run_command([compiler, "--version"])
    if done.returncode:
        raise BuildError(f"{compiler} --version failed: {_first_error_line(done.stderr)}")
    return done.stdout


def _cpu_description() -> str:
    """Return what -march=native depends on: machines with different CPUs may share a home."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    names = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(names)}))


def _cached_library(folder: Path, *, stem: str) -> Path | None:
    for path in sorted(folder.glob(f"{stem}-*.so")):
        if hash_of_file(path).startswith(path.stem.rpartition("-")[2]):
            return path
        path.unlink(missing_ok=True)  # cut short by a full disk, or damaged
    return None


def _compile_into_cache(compiler: str, *, folder: Path, stem: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as name:
        part = Path(name) / f"{stem.partition('-')[0]}.so"
        _compile(compiler, out=part)
        target = folder / f"{stem}-{hash_of_file(part)[:16]}.so"
        part.replace(target)
    return target


def _compile(compiler: str, *, out: Path) -> None:
    source, failure = SOURCE_DIRECTORY / f"{out.stem}.c", ""
    flags = (*COMPILER_FLAGS, CONTRACTION[out.stem])
    for native in NATIVE_FLAGS:
        done = _run_command([compiler, *flags, *native, str(source), "-o", str(out), "-lm"])
        if not done.returncode:
            return
        failure = _first_error_line(done.stderr)
    raise BuildError(f"{compiler} did not compile {source.name}: {failure}")


def _run_command(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=COMPILE_TIMEOUT_S,
    )


def _first_error_line(text: str) -> str:
    errors = [line for line in text.splitlines() if "error" in line] or text.splitlines() or [""]
    return errors[0][:200]


@dataclass(frozen=True, slots=True)
class LibraryStatus:
    """The library if it is usable, and the reason."""

    library: CPULibrary | None
    reason: str


@cache
def load_library() -> LibraryStatus:
    """Build or load the library once per process; it is used if it passes ``check_library``."""
    try:
        path = build_library()
    except BuildError as error:
        return LibraryStatus(None, str(error))
    return check_library(path)


def check_library(path: Path) -> LibraryStatus:
    """Compare the library at ``path`` with the unfused kernel, forward and backward."""
    try:
        library = CPULibrary(path)
    except (OSError, AttributeError) as error:
        return LibraryStatus(None, f"{path.name} cannot be loaded: {error}")
    failure = compare_with_unfused(
        CPUMoEKernel(library, UnfusedMoEKernel(SequentialGEMM())),
        device=torch.device("cpu"),
        dtype=torch.float32,
        activation="swiglu",
        tolerance=1e-4,
    )
    if failure:
        return LibraryStatus(None, f"the compiled kernel {failure}")
    return LibraryStatus(library, "compiled for this CPU; output and gradients are correct")
