"""For the process from which those of stages.py are forked, which imports this module first."""

from data_utils import import_transformers

import_transformers()  # in half the time
