"""Timeline of a predicted step: what a rank waits for, one after the other, and what is hidden."""

from collections.abc import Iterator

from moesaic.monitor.chrome_trace import TraceSpan
from moesaic.planner.step_time import StepTime


def predicted_spans(time: StepTime) -> Iterator[TraceSpan]:
    """Yield the spans of a step, by kind of work; they end at ``time.total``.

    Within compute the order is that of the kinds, not of the blocks: a forecast has sums.
    """
    parts = (
        ("compute", time.compute),
        ("communication", time.communication),
        ("copies between tiers", time.transfers),
        ("update", {"optimizer": time.update}),
        ("pipeline", {"bubble": time.bubble}),
    )
    start = 0.0
    for track, kinds in parts:
        for name, seconds in kinds.items():
            if seconds > 0:
                yield TraceSpan(track, name, start, seconds)
                start += seconds
    if time.hidden > 0:
        yield TraceSpan("hidden by compute", "communication and copies", 0.0, time.hidden)
