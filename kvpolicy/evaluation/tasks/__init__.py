"""The tasks, by name."""

from dataclasses import fields

from kvpolicy.evaluation.task import Task
from kvpolicy.evaluation.tasks.needle import Needle
from kvpolicy.evaluation.tasks.passkey import Passkey
from kvpolicy.evaluation.tasks.ppl import Perplexity
from kvpolicy.evaluation.tasks.recall import Recall
from kvpolicy.evaluation.tasks.repeat import Repeat
from kvpolicy.evaluation.tasks.reuse import Reuse

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Perplexity, Passkey, Recall, Needle, Reuse, Repeat)
}


def tasks_with(setting: str) -> list[str]:
    """Names of the tasks that have a setting of their own, such as ``pairs``."""
    return [
        name for name, task in TASKS.items() if setting in (field.name for field in fields(task))
    ]
