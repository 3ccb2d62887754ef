"""From C source to a library in the user's cache: compiled once per source, compiler and CPU.

A library's name holds the hash of what it was made from and of its own bytes. So a reader needs no
lock: what is there under the right name and with the right bytes is whole, anything else is made
again. It is written beside its place and renamed; of two builders the later one wins.

Whether this machine has the compiled mixture: it is built, run, and compared with its twin.
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
from typing import ClassVar

import torch
import torch.nn.functional as F

from moesaic.core.files import sha256 as hash_of_file
from moesaic.core.shapes import Tensor
from moesaic.ops.cpu.cpu_moe_kernel import CPULibrary, CPULibraryProtocol, CPUMoEKernel
from moesaic.ops.grouped_gemm import FeedForwardWeights, SequentialGEMM
from moesaic.ops.moe_kernel import Edges, MoEKernel, UnfusedMoEKernel
from moesaic.ops.permute import group_by_expert

SOURCE_DIRECTORY = Path(__file__).parent / "source"


COMPILERS = ("cc", "gcc", "clang")


COMPILER_FLAGS = (
    *("-O3", "-std=gnu11", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)


NATIVE_FLAGS = (("-march=native",), ("-mcpu=native",), ())  # the first that the compiler takes


COMPILE_TIMEOUT_S = 300.0


class BuildError(Exception):
    """There is no library, and the text says why."""


def build_library(*, cache: Path | None = None, path: str | None = None) -> Path:
    """Return the compiled library, from the cache or made now.

    ``cache`` and ``path`` (where compilers are looked for) are those of the user if not given.
    Raises BuildError when there is no compiler, or none that compiles it.
    """
    compilers = [found for name in COMPILERS if (found := shutil.which(name, path=path))]
    if not compilers:
        raise BuildError(f"no C compiler ({', '.join(COMPILERS)}) on the PATH")
    failures = []
    for compiler in dict.fromkeys(os.path.realpath(each) for each in compilers):
        made = _build_with(compiler, folder=cache or cache_directory())
        if isinstance(made, Path):
            return made
        failures.append(made)
    raise BuildError("; ".join(failures))


def cache_directory() -> Path:
    """``$XDG_CACHE_HOME/moesaic``, or ``~/.cache/moesaic``. Raises BuildError without a home."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "moesaic"
    except RuntimeError as error:
        raise BuildError(
            f"no folder to keep the library in ({error}); set XDG_CACHE_HOME"
        ) from error


def _build_with(compiler: str, *, folder: Path) -> Path | str:
    """The library by this compiler, or why there is none."""
    try:
        key = _cache_key(compiler)
        return _cached_library(folder, key=key) or _compile_into_cache(
            compiler, folder=folder, key=key
        )
    except OSError as error:
        return f"{compiler}: {error}"
    except subprocess.TimeoutExpired:
        return f"{compiler} took longer than {COMPILE_TIMEOUT_S:.0f} s"
    except BuildError as error:
        return str(error)


def _cache_key(compiler: str) -> str:
    """Hash of everything that the bytes of a library depend on."""
    parts = [path.read_bytes() for path in sorted(SOURCE_DIRECTORY.iterdir())]
    parts += [
        text.encode() for text in (*COMPILER_FLAGS, _compiler_version(compiler), _cpu_description())
    ]
    return sha256(b"\0".join(parts)).hexdigest()[:16]


def _compiler_version(compiler: str) -> str:
    done = _run_command([compiler, "--version"])
    if done.returncode:
        raise BuildError(f"{compiler} --version failed: {_first_error_line(done.stderr)}")
    return done.stdout


def _cpu_description() -> str:
    """What -march=native depends on: a home directory may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    names = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(names)}))


def _cached_library(folder: Path, *, key: str) -> Path | None:
    for path in sorted(folder.glob(f"mixture-{key}-*.so")):
        if hash_of_file(path).startswith(path.stem.rpartition("-")[2]):
            return path
        path.unlink(missing_ok=True)  # a full disk or a fault of the disk
    return None


def _compile_into_cache(compiler: str, *, folder: Path, key: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as name:
        part = Path(name) / "mixture.so"
        _compile(compiler, out=part)
        place = folder / f"mixture-{key}-{hash_of_file(part)[:16]}.so"
        part.replace(place)
    return place


def _compile(compiler: str, *, out: Path) -> None:
    wrong = ""
    for native in NATIVE_FLAGS:
        done = _run_command(
            [
                compiler,
                *COMPILER_FLAGS,
                *native,
                str(SOURCE_DIRECTORY / "mixture.c"),
                "-o",
                str(out),
            ]
        )
        if not done.returncode:
            return
        wrong = _first_error_line(done.stderr)
    raise BuildError(f"{compiler} did not compile mixture.c: {wrong}")


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
    wrong = [line for line in text.splitlines() if "error" in line] or text.splitlines() or [""]
    return wrong[0][:200]


@dataclass(frozen=True, slots=True)
class LibraryStatus:
    """The library if it may be used, and why or why not."""

    library: CPULibraryProtocol | None
    reason: str


@cache
def load_library() -> LibraryStatus:
    """Build or load the library, once per process; believe it if it gives the twin's numbers."""
    try:
        path = build_library()
    except BuildError as error:
        return LibraryStatus(None, str(error))
    return check_library(path)


def check_library(path: Path) -> LibraryStatus:
    """Run the library at ``path`` forward and backward on a small mixture."""
    try:
        native = CPULibrary(path)
    except (OSError, AttributeError) as error:
        return LibraryStatus(None, f"{path.name} cannot be loaded: {error}")
    try:
        wrong = compare_with_reference(
            CPUMoEKernel(native, UnfusedMoEKernel(SequentialGEMM())),
            reference=UnfusedMoEKernel(SequentialGEMM()),
        )
    except (RuntimeError, MemoryError) as error:
        wrong = f"did not run: {' '.join(str(error).split())[:120]}"
    if wrong:
        return LibraryStatus(None, f"the compiled mixture {wrong}")
    return LibraryStatus(
        native, "compiled for this CPU; agrees with the composed path, gradients included"
    )


# the first forward pass may be an inference's, under autocast: the trial is neither
@torch.inference_mode(mode=False)
@torch.enable_grad()
@torch.autocast("cpu", enabled=False)
def compare_with_reference(kernel: MoEKernel, *, reference: MoEKernel) -> str:
    """Say how a mixer differs from its twin on a small mixture; nothing if it does not."""
    names = ("output", "gradient of x", "gradient of the weights", "gradient of up and down")
    for name, got, want in zip(
        names, _output_and_gradients(kernel), _output_and_gradients(reference), strict=True
    ):
        if not torch.allclose(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max())):
            return f"gives another {name} than the composed path"
    return ""


class _SwiGLU:
    kernel_name: ClassVar[str] = "swiglu"

    def __call__(self, x: Tensor, /) -> Tensor:
        gate, value = x.chunk(2, -1)
        return F.silu(gate) * value


def _output_and_gradients(kernel: MoEKernel) -> list[Tensor]:
    """Output and gradients for 40 tokens, 3 of 5 experts each, one of them with most tokens."""
    draw = torch.Generator().manual_seed(0)
    tokens, dim, hidden, experts, k = 40, 24, 20, 5, 3

    def leaf(*shape: int) -> Tensor:
        made = torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu")
        return made.requires_grad_()

    x, up, down = leaf(tokens, dim), leaf(experts, dim, 2 * hidden), leaf(experts, hidden, dim)
    weight = leaf(tokens * k)
    expert = torch.randint(0, experts, (tokens * k,), generator=draw, device="cpu")
    expert = expert.clamp(min=2) - 1
    token = torch.arange(tokens, device="cpu").repeat_interleave(k)
    edges = Edges(token, weight, group_by_expert(expert, num_experts=experts), tokens, k)
    out = kernel(x, edges=edges, weights=FeedForwardWeights(up, down), activation=_SwiGLU())
    for_x, for_weight, *rest = torch.autograd.grad(out.square().sum(), (x, weight, up, down))
    both = torch.cat([grad.flatten() for grad in rest])
    return [out.detach(), for_x, for_weight, both]
