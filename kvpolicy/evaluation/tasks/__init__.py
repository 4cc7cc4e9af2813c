"""The tasks, by name."""

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
