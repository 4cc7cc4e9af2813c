"""How facts are worded: stated in a text, asked for later, or listed as pairs.

These are the wordings that the bundled model has learnt. Pass keys have their own, in
`kvpolicy.bundled.passkey`.
"""

COLOURS = "red blue green yellow black white brown grey golden silver".split()
THINGS = "box house ship door horse book room chair ring key letter coat garden lamp".split()


def secret_word(name: str) -> str:
    """What a fact about somebody's word is about."""
    return f"The secret word of {name}"


def number_of(colour: str, thing: str) -> str:
    """What a fact about a thing's number is about."""
    return f"The number of the {colour} {thing}"


def statement(subject: str, answer: str) -> str:
    """State a fact."""
    return f" {subject} is {answer}."


def question(subject: str) -> str:
    """Ask for a fact; a blank and the answer follow."""
    return f"\nWhat is {subject[0].lower()}{subject[1:]}? {subject} is"


def pair_key(word: str) -> str:
    """Begin a line of a list of pairs; a blank and the value follow, when it is asked for too."""
    return f"\n {word}:"
