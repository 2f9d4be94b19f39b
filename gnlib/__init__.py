"""Full Gauss-Newton as the oracle for language-model optimisers (arXiv 2510.09378).

The usual way in is a notebook or the `gnlib` command. In code: `run_config("laptop", "gauss_newton")` describes a run,
`gnlib.train.train` runs it, `gnlib.study.run_study` runs many, `gnlib.results` makes tables of their records.
"""

from gnlib.config import ConfigError, RunConfig
from gnlib.losses import ConvexLoss, CrossEntropy, MeanSquaredError
from gnlib.model import Decoder
from gnlib.objective import GaussNewton, ProxLinear, TrueLoss, curvature_product
from gnlib.outer_step import OuterStep
from gnlib.profiles import run_config

__version__ = "0.1.0"
__all__ = [
    "ConfigError",
    "ConvexLoss",
    "CrossEntropy",
    "Decoder",
    "GaussNewton",
    "MeanSquaredError",
    "OuterStep",
    "ProxLinear",
    "RunConfig",
    "TrueLoss",
    "curvature_product",
    "run_config",
]
