"""Read the next batch while the network is busy with this one."""

import queue
import threading
import time
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")
_POLL = 0.1  # seconds after which a reader looks whether it is still wanted


class Ahead(Generic[Item]):
    """An iterator whose items a thread of its own draws, two before they are asked for; what it raises comes out here.

    Attributes:
        waited: seconds that were spent on waiting for items.
    """

    def __init__(self, items: Iterator[Item]):
        self._items, self.waited = items, 0.0
        self._drawn: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(2)
        self._unwanted = threading.Event()
        self._thread = threading.Thread(target=self._draw, name="onnxmerge-reader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        begun = time.perf_counter()
        item, error = self._drawn.get()
        self.waited += time.perf_counter() - begun
        if error is not None:
            self._put(item, error)  # it ends for whoever asks again, too
            raise error
        assert item is not None
        return item

    def close(self) -> None:
        """Stop drawing; the thread has ended when this returns."""
        self._unwanted.set()
        self._thread.join()

    def _draw(self) -> None:
        try:
            for item in self._items:
                if not self._put(item, None):
                    return
            self._put(None, StopIteration())
        except BaseException as error:  # whatever it is, it belongs to who asks
            self._put(None, error)

    def _put(self, item: Item | None, error: BaseException | None) -> bool:
        """Whether somebody still wants it."""
        while not self._unwanted.is_set():
            try:
                self._drawn.put((item, error), timeout=_POLL)
                return True
            except queue.Full:
                continue
        return False
