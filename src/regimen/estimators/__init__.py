"""Models in scikit-learn's form: `fit` and `predict`, and a state that a checkpoint holds without pickling."""

from regimen.estimators.boosting import (
    RobustMultiTaskGradientBoosting,
    RobustMultiTaskGradientBoostingClassifier,
    RobustMultiTaskGradientBoostingRegressor,
    minority_score,
)
from regimen.estimators.progress import LinearProgress, MeasureMisfit, RecordedProgress
from regimen.estimators.reading import FitEstimator, Reading
from regimen.estimators.rounds import theta_gradient

__all__ = [
    "FitEstimator",
    "LinearProgress",
    "MeasureMisfit",
    "Reading",
    "RecordedProgress",
    "RobustMultiTaskGradientBoosting",
    "RobustMultiTaskGradientBoostingClassifier",
    "RobustMultiTaskGradientBoostingRegressor",
    "minority_score",
    "theta_gradient",
]
