"""Plasticity in the training loops of others: one module for each framework, and what they log.

`fastplastic.integrations.transformers` and `fastplastic.integrations.lightning` load the framework
that they are for, and are imported by nobody else. Accelerate needs none: `Recycler` takes its
optimizers.
"""

from fastplastic.integrations.loggers import metrics, write_metrics

__all__ = ["metrics", "write_metrics"]
