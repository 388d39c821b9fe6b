"""Picture of the rooms and the direction of imports, `docs/images/rooms.svg`.

python tools/draw_rooms.py
"""

from __future__ import annotations

from pathlib import Path

TARGET = Path(__file__).resolve().parents[1] / "docs" / "images" / "rooms.svg"

# Top line first: colours of line and area, then (room, words, share of the width); without words: not written yet.
LINES = [
    ("#6b675c", "#eceae4", [("cli", "one thin file a command", 1), ("recipes", "YAML, schema, built-in recipes", 1)]),
    ("#b4562f", "#fdeee8", [("studies", "arms trained in one way, report", 2), ("audit", "probes of encoders", 1),
                            ("serving", "", 0.6)]),
    ("#b4781a", "#fdf0d9", [("training", "stages, one trainer", 1), ("evaluation", "tasks, scorers, intervals", 1),
                            ("inference", "engine, chat", 1), ("compression", "", 0.6)]),
    ("#2d7d4f", "#e4f2e9", [("objectives", "what is learned: losses and their modules", 1)]),
    ("#1f7f86", "#e0f1f2", [("encoding", "templates, tokens and labels, batches", 1)]),
    ("#6a48a8", "#ece6f6", [("models", "the composite model, assembly, checkpoints", 1),
                            ("data", "samples, readers, mixtures, generated tasks", 1)]),
    ("#3b5bb5", "#dbe5f6", [("encoders", "ViTs, LM-made encoder", 1), ("connectors", "merge, linear, MLP", 1),
                            ("attention", "sparse patterns, kernels", 1), ("images", "decode, resize, patches", 1)]),
    ("#555555", "#f0f0f0", [("core", "errors, config base, registry, files", 1)]),
]  # fmt: skip
LEFT, WIDTH, GAP, TOP, HEIGHT, STEP = 96, 948, 12, 84, 64, 76


def text(x: float, y: float, size: float, colour: str, words: str, more: str = "") -> str:
    return f'  <text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{colour}"{more}>{words}</text>'


def drawing() -> str:
    bottom = TOP + STEP * len(LINES)
    middle = (TOP + bottom) / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1080 {bottom + 36}" '
        'font-family="Helvetica, Arial, sans-serif" role="img" aria-labelledby="t d">',
        '  <title id="t">The rooms of Unclipped and the direction of imports</title>',
        f'  <desc id="d">{len(LINES)} lines of rooms, from command line to core. A room '
        "imports rooms of its own line and of the lines below. Dashed rooms are not written yet.</desc>",
        f'  <rect width="1080" height="{bottom + 36}" rx="14" fill="#fbfaf7"/>',
        '  <defs><marker id="a" viewBox="0 0 10 10" refX="8.5" refY="5" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 10 5 0 10z" fill="#4a4a4a"/></marker></defs>',
        text(LEFT, 38, 19, "#333", "Rooms, and who may import whom", ' font-weight="bold"'),
        text(LEFT, 62, 14, "#555", "A room imports its own line and the lines below it, never a line above."),
        f'  <path d="M48 88V{bottom - 20}" stroke="#4a4a4a" stroke-width="2.4" marker-end="url(#a)"/>',
        text(0, 0, 15, "#4a4a4a", "imports flow downwards",
             f' text-anchor="middle" transform="translate(38 {middle:g}) rotate(-90)"'),
    ]  # fmt: skip
    for number, (line, area, rooms) in enumerate(LINES):
        y, x = TOP + STEP * number, float(LEFT)
        unit = (WIDTH - GAP * (len(rooms) - 1)) / sum(share for *_, share in rooms)
        for room, words, share in rooms:
            width, is_written = unit * share, bool(words)
            look = f'fill="{area}"' if is_written else 'fill="none" stroke-dasharray="6 5"'
            parts.append(
                f'  <rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{HEIGHT}" rx="9" stroke="{line}" '
                f'stroke-width="1.8" {look}/>'
            )
            centre, anchor = round(x + width / 2, 1), ' text-anchor="middle"'
            if is_written:
                parts.append(text(centre, y + 28, 17, "#2b2b2b", room, f'{anchor} font-weight="bold"'))
                parts.append(text(centre, y + 49, 13.5, "#4a4a4a", words, anchor))
            else:
                parts.append(text(centre, y + 38, 16, "#777", room, anchor))
            x += width + GAP
    parts += [text(LEFT, bottom + 18, 13.5, "#666", "Dashed: not written yet."), "</svg>"]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    TARGET.write_text(drawing())
    print(TARGET)
