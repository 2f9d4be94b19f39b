"""Full Gauss-Newton as the oracle for language-model optimisers (arXiv 2510.09378).

The usual way in is a notebook or the `gnlib` command. In code: `run_config("laptop", "gauss_newton")` describes a run,
`gnlib.train.train` runs it, `gnlib.study.run_study` runs many, `gnlib.results` makes tables of their records. For a
model and a loop of your own: `GaussNewton`.
"""

from gnlib.config import ConfigError, InnerConfig, LineSearchConfig, RunConfig
from gnlib.gauss_newton import GaussNewton
from gnlib.losses import ConvexLoss, CrossEntropy, MeanSquaredError
from gnlib.model import Decoder
from gnlib.objective import GaussNewtonObjective, ProxLinearObjective, TrueLoss, curvature_product
from gnlib.outer_step import OuterStep, StepInfo
from gnlib.profiles import run_config

__version__ = "0.1.0"
__all__ = [
    "ConfigError",
    "ConvexLoss",
    "CrossEntropy",
    "Decoder",
    "GaussNewton",
    "GaussNewtonObjective",
    "InnerConfig",
    "LineSearchConfig",
    "MeanSquaredError",
    "OuterStep",
    "ProxLinearObjective",
    "RunConfig",
    "StepInfo",
    "TrueLoss",
    "curvature_product",
    "run_config",
]
