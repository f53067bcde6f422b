"""Scores of how well a network's columns suit a task, without training a model."""

from __future__ import annotations

from numbers import Real
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from sklearn.utils import check_array, check_consistent_length, column_or_1d

from sktransfer._progress import warn
from sktransfer._rows import is_missing

_N_REPORTED = 5


class Spectrum(NamedTuple):
    """The thin singular value decomposition that the scores of one X share: ``U diag(s) Vᵀ``.

    All scores are the same for X and for ``U diag(s)``, which has at most as many columns as rows.

    Attributes
    ----------
    U : ndarray of shape (n_samples, rank), float64
    s : ndarray of shape (rank,), float64
    n_features : int
        Of X.
    """

    U: np.ndarray
    s: np.ndarray
    n_features: int


def spectrum(X: ArrayLike | Spectrum) -> Spectrum:
    """Return the decomposition of X; of one that is given, itself."""
    if isinstance(X, Spectrum):
        return X
    X = finite(X, "X")
    U, s, _ = np.linalg.svd(X, full_matrices=False)
    # Directions that X has by rounding alone would count in scores that no scale changes.
    is_real = s > np.finfo(float).eps * max(X.shape) * s[0]
    return Spectrum(U[:, is_real], s[is_real], X.shape[1])


def logme_score(X: ArrayLike | Spectrum, y: ArrayLike, *, task: str = "auto") -> float:
    """Compute the logarithm of the maximum evidence of a linear model from X to y.

    The evidence is what Bayesian linear regression gives to the targets, with the precisions of
    the weights and of the noise that maximise it. It needs no cross-validation: overfitting has a
    price. Higher is better.

    Read more in the :ref:`User Guide <transferability>`.

    Parameters
    ----------
    X : array-like of shape (n_samples, n_features)
        The columns that a network gives, for instance by :class:`PretrainedFeatureExtractor`.
    y : array-like of shape (n_samples,) or (n_samples, n_outputs)
        Labels of any type, each class against the others, or numbers.
    task : {"auto", "classification", "regression"}, default="auto"
        ``"auto"``: regression where :func:`sklearn.utils.multiclass.type_of_target` calls `y`
        continuous. Whole numbers are labels then, also as floats.

    Returns
    -------
    score : float
        The logarithm of the evidence per sample, averaged over classes or outputs.

    Raises
    ------
    ValueError
        If a value of X or y is missing or infinite, or y has a single class.

    See Also
    --------
    h_score, transrate_score, leep_score : Other scores.

    Notes
    -----
    X is not centred, as in the paper. With more columns than rows the published code counts the
    surplus columns twice and diverges; this is the evidence itself, which stays finite. It is the
    same for X times any number.

    References
    ----------
    .. [1] K. You, Y. Liu, J. Wang and M. Long. "LogME: Practical assessment of pre-trained models
       for transfer learning." ICML 2021. https://arxiv.org/abs/2102.11005

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sktransfer.transferability import logme_score
    >>> round(logme_score(*load_iris(return_X_y=True)), 3)
    -0.16
    """
    U, s, _ = spectrum(X)
    check_consistent_length(U, y)
    if task not in ("auto", "classification", "regression"):
        raise ValueError(
            f"task={task!r} is not accepted: one of 'auto', 'classification', 'regression'."
        )
    if task == "regression" or (task == "auto" and is_continuous(y)):
        targets = finite(y, "y", ensure_2d=False).reshape(len(U), -1)
    else:
        codes, n_classes = classes_of(y, are_labels=task == "classification")
        targets = np.eye(n_classes)[codes]
    # The evidence is the same for X times any number; this one keeps the squares finite.
    sigma = (s / s.max(initial=0)) ** 2
    return float(np.mean([_log_evidence(U, sigma, target) for target in targets.T]))


def _log_evidence(U: np.ndarray, sigma: np.ndarray, y: np.ndarray) -> float:
    """Maximise the evidence of ``y ~ N(X w, 1 / beta)``, ``w ~ N(0, 1 / alpha)``, per sample.

    ``sigma`` are the eigenvalues of XᵀX. The fixed point of [1]_::

        gamma = Σ sigma / (sigma + alpha / beta)
        alpha = gamma / |m|²,   beta = (n - gamma) / |y - X m|²,   m the mean of w
    """
    n, z2 = len(y), (U.T @ y) ** 2
    outside = max(float(y @ y - z2.sum()), 0.0)  # what no linear model of X can fit
    alpha = beta = 1.0
    for _ in range(100):
        t = alpha / beta
        gamma = (sigma / (sigma + t)).sum()
        m2 = (sigma * z2 / (sigma + t) ** 2).sum()
        residual = (z2 / (1 + sigma / t) ** 2).sum() + outside
        # The small number is that of the published code: a y that X gives exactly has no noise.
        alpha, beta = gamma / max(m2, 1e-30), (n - gamma) / (residual + 1e-5)
        if abs(alpha / beta - t) <= 1e-6 * t:
            break
    # Σ log(alpha + beta sigma) over all columns less n_features log(alpha): what remains is
    # the same for every number of columns beyond the rank.
    logs = np.log1p(sigma / (alpha / beta)).sum()
    evidence = n * np.log(beta / (2 * np.pi)) - logs - beta * residual - alpha * m2
    return evidence / (2 * n)


def h_score(X: ArrayLike | Spectrum, y: ArrayLike, *, shrinkage: bool = True) -> float:
    """Compute the share of the variance of X that lies between the classes, summed over directions.

    The score is ``tr(cov(X)⁻¹ cov(class means))``: 0 where all classes have one mean, at most
    ``n_classes - 1``. Higher is better.

    Read more in the :ref:`User Guide <transferability>`.

    Parameters
    ----------
    X : array-like of shape (n_samples, n_features)
        The columns that a network gives.
    y : array-like of shape (n_samples,)
        Labels of any type.
    shrinkage : bool, default=True
        Whether the covariance is shrunk towards a multiple of the identity, by as much as Ledoit
        and Wolf estimate, and the score with it [2]_: it is 0 where their estimate is that
        multiple, as for few columns without correlation. False is the original score [1]_, which is
        ``n_classes - 1`` for any X of as many columns as rows; a warning says so.

    Returns
    -------
    score : float

    Raises
    ------
    ValueError
        If a value of X or y is missing or infinite, or y has a single class.

    References
    ----------
    .. [1] Y. Bao et al. "An information-theoretic approach to transferability in task transfer
       learning." ICIP 2019. https://doi.org/10.1109/ICIP.2019.8803726
    .. [2] S. Ibrahim, N. Ponomareva and R. Mazumder. "Newer is not always better: Rethinking
       transferability metrics, their peculiarities, stability and performance."
       ECML PKDD 2022. https://doi.org/10.1007/978-3-031-26387-3_42

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sktransfer.transferability import h_score
    >>> round(h_score(*load_iris(return_X_y=True)), 3)
    1.178
    """
    U, s, n_features = spectrum(X)
    codes, n_classes = classes_of(y, U)
    n = len(U)
    if not shrinkage and n_features >= n - 1:
        warn(
            f"X has {n_features} columns and {n} rows: the H-score without shrinkage is then "
            f"{n_classes - 1} for any columns. Use shrinkage=True, or a cross-validated classifier."
        )
    Z = _centred(U, s / s.max(initial=0))
    between = _class_sums(Z, codes, n_classes) / np.sqrt(np.bincount(codes))[:, None]
    between = between.T @ between / (n - 1)
    if not shrinkage:
        return float(np.trace(np.linalg.pinv(Z.T @ Z / (n - 1), hermitian=True) @ between))
    covariance = Z.T @ Z / n
    share = _ledoit_wolf(Z, covariance, n_features)
    # cov(class means) lies in the span of the rows of X, where Z has all that X has.
    covariance *= 1 - share
    covariance.flat[:: len(s) + 1] += share * np.sum(Z**2) / (n * n_features)
    return float((1 - share) * np.trace(np.linalg.pinv(covariance, hermitian=True) @ between))


def _ledoit_wolf(Z: np.ndarray, covariance: np.ndarray, n_features: int) -> float:
    """Return the optimal shrinkage for centred data of `n_features` columns, given rotated as Z.

    O. Ledoit and M. Wolf, "A well-conditioned estimator for large-dimensional covariance
    matrices", J. Multivariate Analysis 2004, https://doi.org/10.1016/S0047-259X(03)00096-4; as
    scikit-learn computes it, in terms that a rotation does not change::

        share = min(b, d) / d,   b = (mean |x|⁴ - |C|²) / n,   d = |C|² - tr(C)² / n_features
    """
    squared = np.sum(covariance**2)
    d = squared - np.trace(covariance) ** 2 / n_features
    b = (np.mean(np.sum(Z**2, axis=1) ** 2) - squared) / len(Z)
    return float(min(b, d) / d) if d > 0 else 0.0


def transrate_score(X: ArrayLike | Spectrum, y: ArrayLike, *, eps: float = 1e-4) -> float:
    """Compute how many more nats X takes to code without the labels than within the classes.

    The score is ``R(X) - mean_c R(X_c)`` with the rate
    ``R(X) = ½ log det(I + XᵀX / (n eps))`` of centred columns at the distortion `eps`, an
    estimate of the mutual information of columns and labels. Higher is better. It grows with the
    scale of X: scale different networks' columns alike before comparing them.

    Read more in the :ref:`User Guide <transferability>`.

    Parameters
    ----------
    X : array-like of shape (n_samples, n_features)
        The columns that a network gives.
    y : array-like of shape (n_samples,)
        Labels of any type.
    eps : float, default=1e-4
        Squared error that the code may have, in units of X².

    Returns
    -------
    score : float

    Raises
    ------
    ValueError
        If a value of X or y is missing or infinite, or y has a single class.

    Warns
    -----
    UserWarning
        If X has at least as many columns as rows: the rates then measure little but their number.

    References
    ----------
    .. [1] L.-K. Huang et al. "Frustratingly easy transferability estimation." ICML 2022.
       https://arxiv.org/abs/2106.09362

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sktransfer.transferability import transrate_score
    >>> round(transrate_score(*load_iris(return_X_y=True)), 3)
    0.589
    """
    if not (isinstance(eps, Real) and eps > 0):
        raise ValueError(f"eps={eps!r} must be positive.")
    decomposed = spectrum(X)
    score = transrate_of(decomposed, y, eps)
    n, n_features = len(decomposed.U), decomposed.n_features
    if n_features >= n:
        warn(
            f"X has {n_features} columns and {n} rows: TransRate then depends on these "
            "numbers far more than on the labels. Use more rows, fewer columns, or a "
            "cross-validated classifier."
        )
    return score


def transrate_of(decomposed: Spectrum, y: ArrayLike, eps: float = 1e-4) -> float:
    """Compute TransRate without a warning."""
    U, s, _ = decomposed
    codes, n_classes = classes_of(y, U)
    Z = _centred(U, s)
    within = [_coding_rate(Z[codes == c], eps) for c in range(n_classes)]
    return _coding_rate(Z, eps) - float(np.mean(within))


def _centred(U: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Return ``U diag(s)`` with columns of mean 0; those of a constant X are 0, not rounding."""
    Z = U * s
    Z -= Z.mean(axis=0)
    Z[np.abs(Z) <= np.finfo(float).eps * len(Z) * s.max(initial=0)] = 0
    return Z


def _coding_rate(Z: np.ndarray, eps: float) -> float:
    gram = Z.T @ Z if len(Z) > Z.shape[1] else Z @ Z.T
    gram /= len(Z) * eps
    gram.flat[:: len(gram) + 1] += 1
    return float(np.linalg.slogdet(gram)[1] / 2)


def leep_score(source_proba: ArrayLike, y: ArrayLike) -> float:
    """Compute the log-likelihood of y given what a model of another task predicts.

    The source model's classes z are translated by their co-occurrence with y:
    ``mean log Σ_z P(y | z) p(z | x)``. The score is at most 0. Higher is better.

    Read more in the :ref:`User Guide <transferability>`.

    Parameters
    ----------
    source_proba : array-like of shape (n_samples, n_source_classes)
        Probabilities of the source task's classes, as its head gives them. With a single 1 in
        each row the score is the negative conditional entropy, NCE [2]_.
    y : array-like of shape (n_samples,)
        Labels of any type.

    Returns
    -------
    score : float

    Raises
    ------
    ValueError
        If a probability is missing, infinite or negative, a row's sum is not 1, or y has a
        missing value or a single class.

    References
    ----------
    .. [1] C. V. Nguyen, T. Hassner, M. Seeger and C. Archambeau. "LEEP: A new measure to evaluate
       transferability of learned representations." ICML 2020. https://arxiv.org/abs/2002.12462
    .. [2] A. T. Tran, C. V. Nguyen and T. Hassner. "Transferability and hardness of supervised
       classification tasks." ICCV 2019. https://doi.org/10.1109/ICCV.2019.00148

    Examples
    --------
    >>> from sktransfer.transferability import leep_score
    >>> round(leep_score([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]], ["ant", "ant", "bee"]), 3)
    -0.385
    """
    p = finite(source_proba, "source_proba")
    codes, n_classes = classes_of(y, p)
    is_wrong = (p < 0).any(axis=1) | (np.abs(p.sum(axis=1) - 1) > 1e-3)
    if is_wrong.any():
        row = int(np.argmax(is_wrong))
        raise ValueError(
            f"Row {row} of source_proba holds no probabilities: its least entry is "
            f"{p[row].min():.4g} and its sum {p[row].sum():.4g}. Give what predict_proba returns."
        )
    joint = _class_sums(p, codes, n_classes)
    mass = joint.sum(axis=0)
    given_z = np.divide(joint, mass, out=np.zeros_like(joint), where=mass > 0)
    return float(np.log(np.einsum("iz,iz->i", p, given_z[codes])).mean())


# -- input -----------------------------------------------------------------------------------
def is_continuous(y: ArrayLike) -> bool:
    """Whether y holds numbers of which any has a fractional part."""
    numbers = as_plain(y)
    return numbers.dtype.kind == "f" and bool((numbers[np.isfinite(numbers)] % 1 > 0).any())


def finite(values: ArrayLike, name: str, *, ensure_2d: bool = True) -> np.ndarray:
    array = check_array(
        values, dtype=np.float64, ensure_2d=ensure_2d, ensure_all_finite=False, input_name=name
    )
    is_bad = ~np.isfinite(array.reshape(len(array), -1)).all(axis=1)
    _raise_if_any(is_bad, f"{name} holds NaN or infinity")
    return array


def classes_of(
    y: ArrayLike, rows: np.ndarray | None = None, *, are_labels: bool = False
) -> tuple[np.ndarray, int]:
    """Return the labels as 0, 1, …, and how many classes there are.

    Numbers with fractional parts are refused, unless it is said that they are labels.
    """
    if rows is not None:
        check_consistent_length(rows, y)
    labels = column_or_1d(as_plain(y))
    _raise_if_any(are_missing(labels), "y holds missing labels")
    if not are_labels and is_continuous(labels):
        raise ValueError(
            "y holds numbers with fractional parts, and labels are needed: logme_score takes "
            "numbers, and y.astype(str) makes labels of them."
        )
    try:
        classes, codes = np.unique(labels, return_inverse=True)
    except TypeError:
        kinds = sorted({type(label).__name__ for label in labels.tolist()})
        raise TypeError(f"y mixes labels of the types {', '.join(kinds)}: use one.") from None
    if len(classes) < 2:
        raise ValueError(
            f"y must have at least two classes; all labels are {labels.tolist()[0]!r}."
        )
    return codes, len(classes)


def read_numbers(y: ArrayLike) -> np.ndarray:
    """Return numbers to predict, of which some differ; a single column as one dimension."""
    numbers = finite(y, "y", ensure_2d=False)
    numbers = numbers[:, 0] if numbers.shape[1:] == (1,) else numbers
    if (numbers == numbers[0]).all():
        raise ValueError(f"y must have at least two values; all are {numbers.tolist()[0]!r}.")
    return numbers


def read_labels(y: ArrayLike) -> np.ndarray:
    """Return labels as an array that scikit-learn takes; 0 and 1 for each if a row has several."""
    labels = as_plain(y)
    if labels.ndim == 2 and labels.shape[1] > 1:
        return labels
    labels = labels.reshape(len(labels))
    classes_of(labels)
    return labels


def are_missing(labels: np.ndarray) -> np.ndarray:
    """Return which labels are None, NaN, infinite, NaT or pandas' NA."""
    if labels.dtype.kind != "O":
        return ~np.isfinite(labels) if labels.dtype.kind in "fc" else labels != labels
    return np.array([is_missing(label) for label in labels.tolist()], dtype=bool)


def as_plain(y: ArrayLike) -> np.ndarray:
    """Return y as an array, of Python objects only where no other type holds them."""
    labels = np.asarray(y)
    if labels.dtype != object:
        return labels
    plain = np.asarray(labels.tolist())
    # Numbers beside texts would become texts.
    is_mixed = plain.dtype.kind in "US" and not all(isinstance(x, str | bytes) for x in labels.flat)
    return labels if is_mixed else plain


def _raise_if_any(is_bad: np.ndarray, what: str) -> None:
    if is_bad.any():
        rows = np.flatnonzero(is_bad)
        more = ", …" if len(rows) > _N_REPORTED else ""
        listed = ", ".join(map(str, rows[:_N_REPORTED]))
        raise ValueError(f"{what} in {len(rows)} of {len(is_bad)} rows: {listed}{more}.")


def _class_sums(Z: np.ndarray, codes: np.ndarray, n_classes: int) -> np.ndarray:
    """Return the sum of the rows of each class."""
    sums = np.zeros((n_classes, Z.shape[1]))
    np.add.at(sums, codes, Z)
    return sums
