"""Chrome trace: a timeline as JSON that chrome://tracing and Perfetto open (Trace Event Format)."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from moesaic.core.files import write_json


@dataclass(frozen=True, slots=True)
class TraceSpan:
    """What ran on a track from ``start_s``, for ``seconds``."""

    track: str
    name: str
    start_s: float
    seconds: float


def write_chrome_trace(path: Path, spans: Iterable[TraceSpan], *, process: str) -> None:
    """Write the spans of one process, a thread for each track in the order of their first spans."""
    spans = list(spans)
    tracks = {track: number for number, track in enumerate(dict.fromkeys(s.track for s in spans))}
    names = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": number, "args": {"name": track}}
        for track, number in tracks.items()
    ]
    events = [
        {
            "ph": "X",  # a complete event; times in microseconds
            "name": span.name,
            "cat": span.track,
            "pid": 0,
            "tid": tracks[span.track],
            "ts": 1e6 * span.start_s,
            "dur": 1e6 * span.seconds,
        }
        for span in spans
    ]
    whole = {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": process}}
    write_json(path, {"traceEvents": [whole, *names, *events], "displayTimeUnit": "ms"})
