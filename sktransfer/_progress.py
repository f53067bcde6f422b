"""A progress bar for terminals and notebooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(n_images: int, verbose: int, advance=None) -> Iterator[Callable[[int], object]]:
    """Show a bar unless `verbose` is 0; call what it gives with each number of finished images."""
    if not verbose:
        yield lambda n: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=n_images, unit="image", unit_scale=n_images > 10_000) as bar:
        yield bar.update
