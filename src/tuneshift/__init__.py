"""TuneShift moves what a fine-tuned language model knows to another model, without the training data.

The method is on one page in `tuneshift.pipeline`. Importing this package imports no model library.
"""

import os

# The model libraries report their use to their makers unless told otherwise before they are imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from tuneshift.errors import ResumeRefused, TuneShiftError, UserError

__all__ = ["ResumeRefused", "TuneShiftError", "UserError", "__version__"]

__version__ = "0.1.0"
