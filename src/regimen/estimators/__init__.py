"""Models in scikit-learn's form: `fit` and `predict`, and a state that a checkpoint holds without pickling."""

from regimen.estimators.boosting import (
    RobustMultiTaskGradientBoosting,
    RobustMultiTaskGradientBoostingClassifier,
    RobustMultiTaskGradientBoostingRegressor,
    minority_score,
)
from regimen.estimators.reading import FitEstimator, Reading
from regimen.estimators.rounds import theta_gradient

__all__ = [
    "FitEstimator",
    "Reading",
    "RobustMultiTaskGradientBoosting",
    "RobustMultiTaskGradientBoostingClassifier",
    "RobustMultiTaskGradientBoostingRegressor",
    "minority_score",
    "theta_gradient",
]
