"""A source that falls silent is named; nothing waits for it for ever."""

import dataclasses
import threading
import time

import pytest

from vit_jax.errors import UserError
from vit_jax.training.feed import DeviceFeed
from vit_jax.training.run import Run


class Silent:
    """A source whose reads never come back from the given one on."""

    def __init__(self, source, reads):
        self._source, self._reads = source, reads
        self.released = threading.Event()

    def __getattr__(self, name):
        return getattr(self._source, name)

    def __len__(self):
        return len(self._source)

    def fetch(self, indices):
        self._reads -= 1
        if self._reads < 0:
            self.released.wait()
        return self._source.fetch(indices)


def test_a_source_that_dies_stops_the_run_by_its_name(tiny_config, digits_npz):
    run = Run.build(tiny_config(data__timeout=0.5))
    source = Silent(run.source, reads=2)
    with dataclasses.replace(run, source=source).open_feed(0) as feed:
        with pytest.raises(UserError, match=rf"{digits_npz.name}.* delivered nothing for \d+ s"):
            take(feed, 3)
        source.released.set()


def test_the_time_of_waiting_for_a_batch_is_counted():
    class Slow:
        num_bad_images = 0

        def __iter__(self):
            time.sleep(0.2)
            yield {"image": 1}

        def close(self):
            pass

    started = time.monotonic()
    with DeviceFeed(Slow(), lambda batch: batch, depth=1) as feed:
        assert feed.waited == 0
        assert feed.next_batch() == {"image": 1}
        assert 0.1 < feed.waited < time.monotonic() - started


def take(feed, number):
    for _ in range(number):
        feed.next_batch()
