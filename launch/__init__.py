"""How runs start: command line, launch lines, pre-flight checks. Imports no torch at module level."""
