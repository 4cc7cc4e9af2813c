"""Closed-loop evaluation: tasks, what policies make of them, and how sure that is.

Tasks turn a text into samples: token sequences in which some tokens are to be predicted. A host
runs the samples under policies and says how likely it found those tokens; everything else is the
same for all hosts and all tasks.
"""
