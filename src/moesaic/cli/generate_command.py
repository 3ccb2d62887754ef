"""``moesaic generate``: continue a text with a trained language model."""

import io
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from moesaic.cli.deferred_imports import deferred
from moesaic.cli.shared_options import (
    JsonOption,
    RunArgument,
    UseOption,
    command_app,
    print_result,
    show_progress,
)
from moesaic.cli.standard_streams import named_stdout
from moesaic.cli.styled_text import visible
from moesaic.cli.user_files import import_user_files

with deferred():
    from moesaic.checkpoint.run_directory import RunDir
    from moesaic.core.errors import UserError
    from moesaic.corpus.readers import limits
    from moesaic.corpus.readers.compressed import open_bytes
    from moesaic.corpus.readers.text_lines import decode_utf8
    from moesaic.model.sampling import Sample
    from moesaic.serve.imported_generation import read_imported_generation
    from moesaic.serve.text_generator import GeneratedText, TextGenerator, TextLimits

app = command_app()
_SEPARATOR = "----"
_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}

PromptArgument = Annotated[
    str | None,
    typer.Argument(metavar="PROMPT", help="The text to continue (default: begin a new one)."),
]
FileOption = Annotated[
    Path | None, typer.Option("--file", metavar="FILE", help="Read the prompt from a file.")
]
StdinOption = Annotated[bool, typer.Option("--stdin", help="Read the prompt from standard input.")]
TemperatureOption = Annotated[
    float | None,
    typer.Option(min=0, help="Logits are divided by it (0.8); 0: the most probable token."),
]
TopKOption = Annotated[
    int | None, typer.Option(min=0, help="Only the K most probable tokens (0: all).")
]
TopPOption = Annotated[
    float | None,
    typer.Option(help="Only the most probable tokens with this share of probability (1)."),
]
MinPOption = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Only tokens with this share of the highest probability (0)."),
]
SeedOption = Annotated[int, typer.Option(min=0, help="Another seed draws another text.")]
MaxTokensOption = Annotated[
    int | None, typer.Option(min=1, max=10**6, help="Tokens of each text (200).")
]
StopOption = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help=r"End before this text (\n: new line); may be repeated."),
]
SamplesOption = Annotated[int, typer.Option(min=1, max=10_000, help="How many texts.")]
LanguageOption = Annotated[
    str | None, typer.Option("--in", help="Language of the text, if the model has several.")
]
NoStreamOption = Annotated[
    bool, typer.Option("--no-stream", help="Show a text when it is whole, in a terminal too.")
]


@app.command()
def generate(
    run: RunArgument,
    prompt: PromptArgument = None,
    *,
    file: FileOption = None,
    stdin: StdinOption = False,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    seed: SeedOption = 0,
    max_tokens: MaxTokensOption = None,
    stop: StopOption = None,
    num_samples: SamplesOption = 1,
    language: LanguageOption = None,
    no_stream: NoStreamOption = False,
    files: UseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a text with a decoder-only run; in a terminal it appears as it is generated.

    An imported model has the defaults of its generation_config.json.

    Example: [cyan]moesaic generate runs/mine "Once upon a time" --temperature 0.7[/]
    """
    usual = read_imported_generation(RunDir(run).imported)
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    given = {name: value for name, value in given.items() if value is not None}
    search = Sample.from_dict({"temperature": 0.8, **usual.texts, **given, "seed": seed})
    max_tokens = max_tokens or usual.max_tokens or 200
    text = _read_prompt(prompt, file=file, stdin=stdin)
    import_user_files(files)
    generator = TextGenerator.open(run)
    words = tuple(_unescape(word) for word in stop or ())
    streams = sys.stdout.isatty() and num_samples == 1 and not (no_stream or as_json)
    if streams:
        _show_piece(0, text)
    answers = generator.generate(
        [text] * num_samples,
        search=search,
        limits=TextLimits(max_tokens=max_tokens, stop=words),
        language=language,
        on_text=_show_piece if streams else None,
    )
    if streams:
        _show_piece(0, "\n")
    else:
        print_result(
            {"search": search.to_dict(), "texts": [asdict(answer) for answer in answers]},
            as_json=as_json,
            show=lambda _: _show(text, answers),
        )
    for note in _notes(answers, max_tokens=max_tokens):
        show_progress(note)


def _read_prompt(prompt: str | None, *, file: Path | None, stdin: bool) -> str:
    """Return the prompt. Raises UserError: several are given, or one that is not UTF-8."""
    given = [name for name, value in (("PROMPT", prompt), ("--file", file)) if value is not None]
    given += ["--stdin"] if stdin else []
    if len(given) > 1:
        raise UserError(f"one prompt is continued, but {' and '.join(given)} are given")
    if file is not None:
        with open_bytes(file) as stream:
            return decode_utf8(_bounded(stream.read(_most() + 1), str(file)), path=file)
    if stdin:
        if sys.stdin.isatty():
            show_progress("the text to continue; end with Ctrl-D")
        if not isinstance(sys.stdin, io.TextIOWrapper):  # a replacement, as in a notebook
            return sys.stdin.read()
        raw = _bounded(sys.stdin.buffer.read(_most() + 1), "standard input")
        return decode_utf8(raw, path="standard input")
    return prompt or ""


def _most() -> int:
    return limits.MAX_DOCUMENT_BYTES


def _bounded(raw: bytes, name: str) -> bytes:
    if len(raw) > _most():
        raise UserError(f"{name}: a prompt of more than {limits.as_size(_most())}, the limit")
    return raw


def _unescape(word: str) -> str:
    r"""Return a stop string with ``\n``, ``\t`` and ``\\`` replaced."""
    if not word:
        raise UserError("--stop: found an empty text, expected the text to end before")
    parts, rest = [], word
    while "\\" in rest:
        before, _, after = rest.partition("\\")
        known = after[:1] in _ESCAPES
        parts += [before, _ESCAPES[after[0]] if known else "\\"]
        rest = after[1:] if known else after
    return "".join([*parts, rest])


def _show_piece(_: int, text: str) -> None:
    with named_stdout():
        sys.stdout.write(visible(text))
        sys.stdout.flush()


def _show(prompt: str, answers: Sequence[GeneratedText]) -> None:
    texts = (prompt + answer.text for answer in answers)
    whole = f"\n{_SEPARATOR}\n".join(texts) + "\n"
    sys.stdout.write(visible(whole) if sys.stdout.isatty() else whole)


def _notes(answers: Sequence[GeneratedText], *, max_tokens: int) -> list[str]:
    notes = []
    if cut := sum(answer.ended == "length" for answer in answers):
        which = "the text is" if len(answers) == 1 else f"{cut} of {len(answers)} texts are"
        notes.append(f"{which} cut off after {max_tokens} tokens (--max-tokens)")
    if skipped := answers[0].skipped:
        notes.append(f"the first {skipped} tokens of the prompt are beyond the model's positions")
    return notes
