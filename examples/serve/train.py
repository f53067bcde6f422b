"""Fit a pipeline on FOLDER/CLASS/*.jpg and save it: python train.py FOLDER model.sktransfer."""

import sys
from pathlib import Path

from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sktransfer import PretrainedFeatureExtractor, save


def train(folder, model_path):
    paths = sorted(path for path in Path(folder).glob("*/*") if path.is_file())
    classifier = LogisticRegression(max_iter=1000)
    model = make_pipeline(PretrainedFeatureExtractor(), StandardScaler(), classifier)
    model.fit(paths, [path.parent.name for path in paths])
    save(model, model_path, standalone=True)


if __name__ == "__main__":
    train(*sys.argv[1:])
