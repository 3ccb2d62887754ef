from moesaic.monitor.timing import Spans


def test_spans_of_one_name_add_up_and_are_taken_once():
    times = iter([0.0, 1.0, 10.0, 12.5, 20.0, 20.5])
    spans = Spans(clock=lambda: next(times))
    for name in ("data", "data", "step"):
        with spans(name):
            pass
    assert spans.take() == {"data": 3.5, "step": 0.5}
    assert spans.take() == {}


def test_a_span_that_fails_is_counted():
    times = iter([0.0, 2.0])
    spans = Spans(clock=lambda: next(times))
    try:
        with spans("data"):
            raise KeyError
    except KeyError:
        pass
    assert spans.take() == {"data": 2.0}
