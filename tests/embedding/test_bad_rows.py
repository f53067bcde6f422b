"""What cannot be read is reported, row by row, and costs no work."""

import re

import numpy as np
import pandas as pd
import pytest
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline

from sktransfer import PretrainedFeatureExtractor


@pytest.fixture
def with_bad_rows(picture_files, tmp_path):
    truncated = tmp_path / "truncated.png"
    with open(picture_files[0], "rb") as whole:
        truncated.write_bytes(whole.read()[:60])
    return [*picture_files[:2], str(tmp_path / "missing.png"), picture_files[2], str(truncated)]


def test_raise_reports_all_bad_rows_and_keeps_the_good(with_bad_rows, count_embedded):
    extractor = PretrainedFeatureExtractor()
    with pytest.raises(ValueError, match=r"2 of 5 images could not be read") as caught:
        extractor.fit_transform(with_bad_rows)
    message = str(caught.value)
    assert "row 2" in message
    assert "missing.png" in message
    assert "row 4" in message
    assert "truncated.png" in message
    assert "The others are embedded and kept" in message
    assert 'on_error="nan"' in message
    assert [bad.row for bad in extractor.bad_images_] == [2, 4]
    assert caught.value.bad_images == extractor.bad_images_
    assert count_embedded["images"] == 3
    good = [with_bad_rows[i] for i in (0, 1, 3)]
    extractor.transform(good)
    assert count_embedded["images"] == 3
    assert extractor.bad_images_ == []


def test_many_bad_rows_are_counted(tmp_path):
    paths = [str(tmp_path / f"{i}.png") for i in range(30)]
    with pytest.raises(ValueError, match=r"30 of 30 images[\s\S]*and 20 more") as caught:
        PretrainedFeatureExtractor().fit_transform(paths)
    assert "The others are" not in str(caught.value)  # there are none


@pytest.mark.parametrize(("on_error", "value"), [("nan", np.nan), ("zero", 0.0)])
def test_bad_rows_become_a_value(with_bad_rows, on_error, value):
    extractor = PretrainedFeatureExtractor(on_error=on_error)
    rows = extractor.fit_transform(with_bad_rows)
    np.testing.assert_array_equal(rows[[2, 4]], value)
    assert np.isfinite(rows[[0, 1, 3]]).all()
    assert [bad.row for bad in extractor.bad_images_] == [2, 4]


@pytest.mark.parametrize("container", [list, pd.Series])
def test_the_first_row_may_hold_a_number(picture_files, container):
    X = container([0, *picture_files[:2]])  # as fillna(0) leaves it
    extractor = PretrainedFeatureExtractor(on_error="nan")
    assert np.isnan(extractor.fit_transform(X)[:, 0]).tolist() == [True, False, False]
    assert [bad.reason[:23] for bad in extractor.bad_images_] == ["the cell is of type int"]


def test_nan_rows_are_imputed_in_a_pipeline(with_bad_rows):
    pipe = make_pipeline(PretrainedFeatureExtractor(on_error="nan"), SimpleImputer())
    assert np.isfinite(pipe.fit_transform(with_bad_rows)).all()


def test_bad_rows_of_several_columns_name_the_column(picture_files):
    frame = pd.DataFrame({"front": picture_files[:3], "back": [picture_files[3], None, ""]})
    with pytest.raises(ValueError, match=r"row 1, column 'back'[\s\S]*row 2, column 'back'"):
        PretrainedFeatureExtractor().fit_transform(frame)


def test_float_range_assumption_is_one_warning(pictures):
    with pytest.warns(UserWarning, match="outside 0…1") as caught:
        rows = PretrainedFeatureExtractor().fit_transform(pictures.astype(float))
    assert len(caught) == 1
    np.testing.assert_array_equal(rows, PretrainedFeatureExtractor().fit_transform(pictures))


def test_a_bad_picture_does_not_mark_its_row_in_other_columns(picture_files, tmp_path):
    missing = str(tmp_path / "missing.png")
    frame = pd.DataFrame(
        {"a": [missing, picture_files[0]], "b": [picture_files[1], picture_files[1]]}
    )
    extractor = PretrainedFeatureExtractor(on_error="nan")
    rows = extractor.fit_transform(frame)
    (bad,) = extractor.bad_images_
    assert re.fullmatch(r"row 0, column 'a' \('.*missing.png'\)", bad.where)  # cut if it is long
    width = rows.shape[1] // 2
    assert np.isfinite(rows[:, width:]).all()


def test_zero_leaves_good_rows_alone(pictures):
    X = [pictures[0] * 0 + 255, None, pictures[1]]
    rows = PretrainedFeatureExtractor(on_error="zero", memory=False).fit_transform(X)
    alone = PretrainedFeatureExtractor(memory=False).fit_transform([X[0], X[2]])
    np.testing.assert_allclose(rows[[0, 2]], alone, rtol=1e-5, atol=1e-6)
    assert not rows[1].any()


def test_bad_images_are_progress_too(tmp_path, capsys):
    paths = [str(tmp_path / f"{i}.png") for i in range(120)]
    PretrainedFeatureExtractor(on_error="zero", n_jobs=4, verbose=1).fit_transform(paths)
    assert "120/120" in capsys.readouterr().err
