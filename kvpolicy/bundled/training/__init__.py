"""How the bundled model is made: `python -m kvpolicy.bundled.training --help`.

Reading order: corpus and tokenizer, tasks, schedule, model, wiring, optimiser,
train, export, launch. What came out is measured by retrieval, evaluate, heads.
"""
