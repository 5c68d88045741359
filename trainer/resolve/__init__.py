"""Recipe defaults < --config YAML < section.key=value, resolved into one checked config. Imports no torch.

fields (the table of settings) <- values, layers, suggest (what was written) <- merge, rules, checks (what it means)
<- build (the config or all its problems) <- show, schema, entry (what the user sees).
"""

from trainer.resolve.build import Attempt, Resolved, load_config, resolve, try_resolve
from trainer.resolve.entry import end_quickly, error_text, run_recipe
from trainer.resolve.schema import json_schema
from trainer.resolve.show import config_to_yaml

__all__ = [
    "Attempt",
    "Resolved",
    "config_to_yaml",
    "end_quickly",
    "error_text",
    "json_schema",
    "load_config",
    "resolve",
    "run_recipe",
    "try_resolve",
]
