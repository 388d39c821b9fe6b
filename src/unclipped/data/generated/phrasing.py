"""The wording of questions: one compact form, and several full sentences, for each form of question."""

from __future__ import annotations

from unclipped.data.generated.dice import Dice

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")

# form -> (short, full sentences). Forms are named generator.form; fields in braces are filled by the generator.
PHRASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "characters.number": (
        "number?",
        ("What number is written here?", "Which number do you see?", "Read the number in the image."),
    ),
    "characters.number_by_colour": (
        "{colour} number?",
        ("What is the {colour} number?", "Which number is written in {colour}?", "Read the number in {colour}."),
    ),
    "characters.word": (
        "word?",
        ("What word is written here?", "Which word do you see?", "Read the word in the image."),
    ),
    "characters.word_by_colour": (
        "{colour} word?",
        ("What is the {colour} word?", "Which word is written in {colour}?", "Read the word in {colour}."),
    ),
    "characters.kth_glyph": (
        "{what} {k}?",
        ("What is the {kth} {what}?", "Which {what} is the {kth} one?", "Name the {kth} {what}."),
    ),
    "characters.kth_item": (
        "line {line} item {k}?",
        (
            "What is the {kth} item on line {line}?",
            "Read the {kth} item of line {line}.",
            "Which word or number is the {kth} on line {line}?",
        ),
    ),
    "characters.kth_word": (
        "line {line} word {k}?",
        ("What is the {kth} word on line {line}?", "Read the {kth} word of line {line}."),
    ),
    "characters.kth_number": (
        "line {line} number {k}?",
        ("What is the {kth} number on line {line}?", "Read the {kth} number of line {line}."),
    ),
    "characters.count_glyphs": (
        "how many?",
        (
            "How many letters or digits are there?",
            "Count the letters or digits in the image.",
            "How many characters are written here?",
        ),
    ),
    "characters.count_items": (
        "how many {what}s?",
        ("How many {what}s are there?", "Count the {what}s in the image.", "What is the number of {what}s?"),
    ),
    "characters.colour": (
        "colour?",
        ("What colour is the text?", "In which colour is it written?", "Name the colour of the text."),
    ),
    "characters.colour_of": (
        "colour of {string}?",
        ('What colour is "{string}"?', 'In which colour is "{string}" written?', 'Name the colour of "{string}".'),
    ),
    "characters.larger": (
        "larger?",
        ("Which number is larger?", "What is the larger of the two numbers?", "Read the greater number."),
    ),
    "characters.smaller": (
        "smaller?",
        ("Which number is smaller?", "What is the smaller of the two numbers?", "Read the lesser number."),
    ),
    "characters.where": (
        "where?",
        ("Where is the text?", "In which part of the image is the text?", "In which part does the text stand?"),
    ),
    "characters.where_is": (
        "where is {string}?",
        ('Where is "{string}"?', 'In which part of the image is "{string}"?', 'Where does "{string}" stand?'),
    ),
}


def ask(dice: Dice, phrasing: str, form: str, **fields: object) -> str:
    """The question of a form, worded short or as one of its full sentences."""
    short, full = PHRASES[form]
    return (short if phrasing == "short" else dice.pick(full)).format(**fields)
