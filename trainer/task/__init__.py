"""What is learned, between the data and the loop: samples by number, loss, metrics, report. One module a task, one table.

A task knows nothing of backends but what `Engine` says of ranks, and the loop nothing of what a sample is.
"""

from trainer.task.protocol import Evaluation, Forward, Outputs, Task, build_task

__all__ = ["Evaluation", "Forward", "Outputs", "Task", "build_task"]
