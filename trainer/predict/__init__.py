"""Prediction with an exported model or a model source, by task: one module a task, one table (answer.py)."""
