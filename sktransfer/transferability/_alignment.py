"""Phase correlation: whether two images show the same, shifted, mirrored, turned or cropped."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch.nn import functional

SIZE = 64  # pixels a side of the thumbnails
_BAND = 32  # frequencies a side that are compared; finer ones do not survive a re-saved file
_WHITENING = 0.3
_SCALES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
_BLOCK = 256  # pairs compared at once; they fit into a processor's cache
_SYMMETRIES = tuple((turns, is_mirrored) for is_mirrored in (False, True) for turns in range(4))
_SAME_FRAME = 1  # of _BAND positions that an image may be shifted and still have the same frame
_SAME_LEVELS = 6.0  # of 255, root mean square


def correlate(thumbnails: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Correlate pairs of thumbnails over all shifts.

    Both spectra are whitened, ``F / (abs(F) + 0.3 * mean(abs(F)))``, so that edges count and
    brightness, contrast and the even surfaces that different images share do not. The similarity
    is the largest value of the cosine of the two whitened images over all shifts [1]_.

    Parameters
    ----------
    thumbnails : ndarray of shape (n_images, SIZE, SIZE), uint8
    pairs : ndarray of shape (n_pairs, 2)

    Returns
    -------
    similarities : ndarray of shape (n_pairs,), float32
    are_in_place : ndarray of shape (n_pairs,), bool
        Whether the best shift is none, to within 3 % of the image.

    References
    ----------
    .. [1] C. D. Kuglin and D. C. Hines. "The phase correlation image alignment method." IEEE
       International Conference on Cybernetics and Society, 1975.
    """
    spectra = _spectra(thumbnails)
    return _correlate(spectra, spectra, pairs)


def find_alignments(
    thumbnails: np.ndarray, pairs: np.ndarray, similarities: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Look for mirrored, turned and cropped images where that fits better than a shift.

    Returns
    -------
    similarities : ndarray of shape (n_pairs,), float32
        The largest found, at least as large as the given ones.
    kinds : ndarray of shape (n_pairs,), str
        ``"flip"``, ``"rotation"``, ``"crop"``, or ``""`` where no such pair fits better.
    """
    similarities, kinds = similarities.copy(), np.full(len(pairs), "", dtype="<U8")
    used, inverse = np.unique(pairs, return_inverse=True)
    thumbnails, pairs = thumbnails[used], inverse.reshape(-1, 2)
    whole = _spectra(thumbnails)

    def look(kind: str, changed: torch.Tensor, pairs: np.ndarray) -> None:
        found, _ = _correlate(changed, whole, pairs)
        is_better = found > similarities
        similarities[is_better] = found[is_better]
        kinds[is_better] = kind

    for turns, is_mirrored in _SYMMETRIES[1:]:
        turned = _spectra(_turned(thumbnails, turns, is_mirrored))
        look("flip" if is_mirrored else "rotation", turned, pairs)
    for scale in _SCALES:
        scaled = _spectra(thumbnails, scale)
        look("crop", scaled, pairs)
        look("crop", scaled, pairs[:, ::-1])
    return similarities, kinds


def other_orientations(
    thumbnails: np.ndarray, pairs: np.ndarray, are_turned: np.ndarray
) -> np.ndarray:
    """Return the largest similarity in an orientation other than the one that fits.

    Stripes, chequers and a single blob match others of their kind in any orientation.

    Parameters
    ----------
    are_turned : ndarray of shape (n_pairs,), bool
        Whether a flip or turn is what fits; else it is the upright orientation.
    """
    largest = np.empty(len(pairs), dtype=np.float32)
    for start in range(0, len(pairs), _BLOCK):
        part = slice(start, start + _BLOCK)
        first, second = (thumbnails[pairs[part, k]] for k in (0, 1))
        whole = _spectra(second)
        peaks = np.array([_peaks(_spectra(_turned(first, *s)), whole)[0] for s in _SYMMETRIES])
        largest[part] = np.where(are_turned[part], np.sort(peaks, 0)[-2], peaks[1:].max(0))
    return largest


def _turned(thumbnails: np.ndarray, turns: int, is_mirrored: bool) -> np.ndarray:
    return np.rot90(thumbnails[:, :, ::-1] if is_mirrored else thumbnails, turns, axes=(1, 2))


def have_equal_levels(thumbnails: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return for each pair whether the grey levels differ by less than re-saving changes them."""
    # Means of 4×4 pixels: finer details depend on how an image was scaled.
    coarse = thumbnails.reshape(-1, SIZE // 4, 4, SIZE // 4, 4).mean(axis=(2, 4))
    difference = coarse[pairs[:, 0]] - coarse[pairs[:, 1]]
    return np.sqrt(np.square(difference).mean(axis=(1, 2))) < _SAME_LEVELS


def _spectra(thumbnails: np.ndarray, scale: float = 1.0) -> torch.Tensor:
    """Return the whitened low frequencies of thumbnails, scaled down into the upper left corner."""
    parts = (thumbnails[i : i + _BLOCK] for i in range(0, len(thumbnails), _BLOCK))
    rows = [_spectra_of_block(part, scale) for part in parts]
    return torch.cat(rows) if rows else torch.empty(0, _BAND, _BAND // 2 + 1)


def _spectra_of_block(thumbnails: np.ndarray, scale: float) -> torch.Tensor:
    """Scale, window and transform: one matrix for each axis."""
    x = torch.from_numpy(np.ascontiguousarray(thumbnails)).float()
    x -= x.mean((1, 2), keepdim=True)
    rows, columns = _transform(scale)
    f = torch.matmul(rows, torch.complex(x @ columns.real, x @ columns.imag))
    f[:, 0, 0] = 0
    size = f.abs()
    weight = 1 / (size + _WHITENING * size.mean((1, 2), keepdim=True)).clamp_min(1e-9)
    power = (size * weight).square()
    # A real image's spectrum is stored by half: all but the outer columns count twice.
    energy = 2 * power.sum((1, 2), keepdim=True) - power[:, :, [0, -1]].sum((1, 2), keepdim=True)
    return f * (weight / energy.sqrt().clamp_min(1e-9))


@functools.cache
def _transform(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the matrices (_BAND, SIZE) and (SIZE, _BAND // 2 + 1) around the pixels."""
    size = round(SIZE * scale)
    # Without a window that falls to zero the borders would correlate in any two images.
    window = torch.hann_window(size + 2, periodic=False)[1:-1].sqrt()
    shrink = functional.interpolate(
        torch.eye(SIZE)[None, None], (size, SIZE), mode="bilinear", antialias=True
    )[0, 0]
    frequencies = torch.fft.fftfreq(_BAND) * _BAND
    angles = -2 * torch.pi / SIZE * frequencies[:, None] * torch.arange(size)
    rows = torch.polar(torch.ones_like(angles), angles) @ (window[:, None] * shrink).to(
        torch.complex64
    )
    return rows, rows[: _BAND // 2 + 1].T.contiguous()


def _correlate(
    first: torch.Tensor, second: torch.Tensor, pairs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the peaks of pairs of spectra, by their rows."""
    similarities = np.empty(len(pairs), dtype=np.float32)
    are_in_place = np.empty(len(pairs), dtype=bool)
    for start in range(0, len(pairs), _BLOCK):
        part = slice(start, start + _BLOCK)
        i, j = torch.from_numpy(pairs[part].T.copy())
        similarities[part], are_in_place[part] = _peaks(first[i], second[j])
    return similarities, are_in_place


def _peaks(first: torch.Tensor, second: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest correlation over all shifts, and whether its shift is next to none."""
    surface = torch.fft.irfft2(first * second.conj(), s=(_BAND, _BAND), norm="forward").flatten(1)
    height, where = surface.max(dim=1)
    row, column = where // _BAND, where % _BAND
    shift = torch.maximum(torch.minimum(row, _BAND - row), torch.minimum(column, _BAND - column))
    return height.clamp(0, 1).numpy(), (shift <= _SAME_FRAME).numpy()
