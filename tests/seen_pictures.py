"""Preprocessing that tells, through files, what other processes did with the pictures."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np


class SeenPictures:
    """Scales pictures to 0…1 and writes a line to a file for each that comes by.

    What the store holds is not decoded, so the file tells how many pictures went through a
    network in all processes.

    Parameters
    ----------
    folder : Path
        Where the files are.
    die_at : int or None
        The process that sees this picture, counted over all processes, ends at once; only
        the first that comes there.
    interrupt_at : int or None
        The process that sees this picture gets what Ctrl-C sends.
    """

    def __init__(self, folder, die_at=None, interrupt_at=None):
        self.folder = Path(folder)
        self.die_at, self.interrupt_at = die_at, interrupt_at

    def __call__(self, picture):
        if not (picture == 127).all():  # by which the library finds out the input's size
            self._note()
        return np.moveaxis(picture[:32, :32], -1, 0).astype(np.float32) / 255

    def _note(self):
        with open(self.folder / "seen", "ab", buffering=0) as file:  # one write each: whole lines
            file.write(f"{os.getpid():9d}\n".encode())
        if self.n_seen == self.interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)
        if self.die_at is not None and self.n_seen >= self.die_at and self._is_first("died"):
            os._exit(1)

    def _is_first(self, name):
        try:
            (self.folder / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    @property
    def n_seen(self):
        path = self.folder / "seen"
        return path.stat().st_size // 10 if path.exists() else 0

    @property
    def pids(self):
        """Which processes saw pictures."""
        return self.pids_since(0)

    def pids_since(self, n):
        """Which processes saw pictures after the first n."""
        return {int(line) for line in (self.folder / "seen").read_text().split()[n:]}

    def wait_for(self, n, seconds=60):
        """Wait until n pictures were seen."""
        end = time.monotonic() + seconds
        while self.n_seen < n:
            assert time.monotonic() < end, f"{self.n_seen} of {n} pictures in {seconds} s"
            time.sleep(0.01)
