"""Numbers and photographs in one model: do photographs improve the predicted price of a house?

    python examples/table_and_photos.py HOUSES_FOLDER

The folder holds houses.csv with bedrooms, bathrooms, area, price and the paths of four
photographs of each house (Ahmed and Moustafa, 2016, https://arxiv.org/abs/1609.08399).
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sktransfer import PretrainedFeatureExtractor

PHOTOS = ["frontal", "bedroom", "bathroom", "kitchen"]
NUMBERS = ["bedrooms", "bathrooms", "area"]

folder = Path(sys.argv[1])
houses = pd.read_csv(folder / "houses.csv")
houses[PHOTOS] = houses[PHOTOS].map(lambda path: str(folder / path))
log_price = np.log(houses["price"])
folds = KFold(5, shuffle=True, random_state=0)  # neighbouring rows are alike

photos = (make_pipeline(PretrainedFeatureExtractor(), StandardScaler()), PHOTOS)
numbers = (StandardScaler(), NUMBERS)
for name, columns in {"numbers": [numbers], "photos": [photos], "both": [numbers, photos]}.items():
    for model in (RidgeCV(np.logspace(0, 5, 11)), HistGradientBoostingRegressor(random_state=0)):
        pipe = make_pipeline(make_column_transformer(*columns), model)
        r2 = cross_val_score(pipe, houses, log_price, cv=folds)
        print(f"{name:8} {type(model).__name__:30} R² {r2.mean():.2f} ± {r2.std():.2f}")
