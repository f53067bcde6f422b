"""Fit a pipeline on FOLDER/CLASS/*.jpg and save it: python train.py FOLDER model.sktransfer."""

import argparse
from pathlib import Path

from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sktransfer import PretrainedFeatureExtractor, save


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("model", type=Path)
    options = parser.parse_args()
    paths = sorted(path for path in options.folder.glob("*/*") if path.is_file())
    model = make_pipeline(
        PretrainedFeatureExtractor(), StandardScaler(), LogisticRegression(max_iter=1000)
    )
    model.fit(paths, [path.parent.name for path in paths])
    save(model, options.model, standalone=True)
    print(f"{options.model}: {len(model.classes_)} classes, {len(paths)} images")


if __name__ == "__main__":
    main()
