"""A progress bar for terminals and notebooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress_bar(
    n_images: int, verbose: int, advance: Callable[[int], Any] | None = None
) -> Iterator[Callable[[int], Any]]:
    """Give a function that is told how many images have just been finished.

    Parameters
    ----------
    n_images : int
        How many there are.
    verbose : int
        0: no bar.
    advance : callable or None
        Told of the same numbers.
    """
    if not verbose:
        yield advance or (lambda n: None)
        return
    from tqdm.auto import tqdm

    with tqdm(total=n_images, unit="image", unit_scale=n_images > 10_000) as bar:

        def tick(n: int) -> None:
            bar.update(n)
            if advance is not None:
                advance(n)

        yield tick
