"""The wording of questions and instructions: one compact form and several full sentences for each."""

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
    "shapes.count": (
        "how many?",
        ("How many shapes are there?", "Count the shapes in the image.", "What is the number of shapes?"),
    ),
    "shapes.count_of": (
        "how many {what}?",
        ("How many {what} are there?", "Count the {what}.", "What is the number of {what}?"),
    ),
    "shapes.colour": ("colour?", ("What colour is the shape?", "Name the colour of the shape.")),
    "shapes.colour_of": (
        "colour of the {shape}?",
        ("What colour is the {shape}?", "Name the colour of the {shape}.", "In which colour is the {shape} drawn?"),
    ),
    "shapes.largest": (
        "largest?",
        ("Which shape is the largest?", "Name the biggest shape and its colour.", "What is the largest shape?"),
    ),
    "shapes.smallest": (
        "smallest?",
        ("Which shape is the smallest?", "Name the tiniest shape and its colour.", "What is the smallest shape?"),
    ),
    "shapes.where": (
        "where is the {shape}?",
        ("In which part of the image is the {shape}?", "Where is the {shape}?", "Where do you see the {shape}?"),
    ),
    "needle.number": (
        "number?",
        ("What is the number on this page?", "Which number stands among the words?", "Find the number and read it."),
    ),
    "receipts.price": (
        "price of {name}?",
        ("What does the {name} cost?", "How much is the {name}?", "Read the price of the {name}."),
    ),
    "receipts.total": ("total?", ("What is the total?", "How much was paid in all?", "Read the total of the receipt.")),
    "receipts.shop": ("shop?", ("What is the name of the shop?", "Which shop is this receipt from?")),
    "receipts.date": ("date?", ("What is the date on the receipt?", "On which date was this bought?")),
    "receipts.item_at": ("what costs {price}?", ("Which item costs {price}?", "What was bought for {price}?")),
    "receipts.kth": (
        "item {k}?",
        (
            "What is the {kth} item on the receipt?",
            "Name the {kth} item.",
            "Which item stands on the {kth} line of goods?",
        ),
    ),
    "receipts.count": ("how many items?", ("How many items were bought?", "Count the lines of goods on the receipt.")),
    "receipts.dearest": ("dearest?", ("Which item costs the most?", "What is the most expensive item?")),
    "receipts.cheapest": ("cheapest?", ("Which item costs the least?", "What is the cheapest item?")),
    "tables.cell": (
        "{row} {column}?",
        (
            "What is the {column} of {row}?",
            "What stands in row {row}, column {column}?",
            "Read the cell of row {row} under {column}.",
        ),
    ),
    "tables.kth": (
        "{column} {k}?",
        ("What is the {kth} entry under {column}?", "Read the {kth} cell of column {column}."),
    ),
    "tables.rows": (
        "how many rows?",
        ("How many rows are there below the titles?", "Count the rows, titles left out."),
    ),
    "tables.columns": (
        "how many columns?",
        ("How many columns are there beside the row names?", "Count the columns, row names left out."),
    ),
    "tables.largest": (
        "largest {column}?",
        ("Which row has the largest {column}?", "In which row is {column} highest?"),
    ),
    "tables.smallest": (
        "smallest {column}?",
        ("Which row has the smallest {column}?", "In which row is {column} lowest?"),
    ),
    "tables.row_of": ("row of {value}?", ("In which row is {value}?", "Which row holds {value}?")),
    "tables.column_of": ("column of {value}?", ("In which column is {value}?", "Which column holds {value}?")),
    "charts.value": (
        "{name}?",
        ("What is the value of {name}?", "How much is {name}?", "Read the value of {name} from the chart."),
    ),
    "charts.count": (
        "how many {what}s?",
        ("How many {what}s does the chart have?", "Count the {what}s.", "How many {what}s are there?"),
    ),
    "charts.colour_of": (
        "colour of {name}?",
        ("What colour is {name}?", "Which colour stands for {name}?", "Name the colour of {name}."),
    ),
    "charts.line_colour": ("colour of the line?", ("What colour is the line?", "In which colour is the line drawn?")),
    "charts.highest": ("largest?", ("Which one is the largest?", "What has the highest value?")),
    "captions.describe": (
        "describe:",
        ("Describe the image in detail.", "What does the image show?", "Say all that can be seen in the image."),
    ),
    "charts.lowest": ("smallest?", ("Which one is the smallest?", "What has the lowest value?")),
}


def ask(dice: Dice, phrasing: str, form: str, **fields: object) -> str:
    """The question of a form, worded short or as one of its full sentences."""
    short, full = PHRASES[form]
    return (short if phrasing == "short" else dice.pick(full)).format(**fields)
