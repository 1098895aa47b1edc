"""TuneShift moves what a fine-tuned language model knows to another model, without the training data.

The method is on one page in `tuneshift.pipeline`. Importing this package imports no model library.
"""

from tuneshift.errors import ResumeRefused, TuneShiftError, UserError

__all__ = ["ResumeRefused", "TuneShiftError", "UserError", "__version__"]

__version__ = "0.1.0"
