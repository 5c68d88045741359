"""What is learned of a row of tokens: one module an objective, one table (table.py). numpy in, numpy out.

An objective turns rows of a token stream into what the model is given and what it must find. Invariant: a sample's masks, spans and
orders are a function of (seed, number of the sample) alone, so they are the same on any number of ranks, and after a resume.
"""

from trainer.data.objectives.rows import Rows, Vocabulary
from trainer.data.objectives.table import OBJECTIVES, Objective, build_objective, is_paired, row_length

__all__ = ["OBJECTIVES", "Objective", "Rows", "Vocabulary", "build_objective", "is_paired", "row_length"]
