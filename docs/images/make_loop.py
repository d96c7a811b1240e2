"""Draws `loop.svg`: the five verbs around the rollout. Run it after changing a word."""

from pathlib import Path

VERBS = [
    ("collect", "Task", "runs a policy, or", "reads a data set"),
    ("judge", "Reward", "named components,", "scored / n.a. / failed"),
    ("credit", "Credit", "advantages, pairs", "or a selection"),
    ("learn", "Update", "objectives on", "members of the cast"),
    ("adapt", "Controller", "moves knobs by", "schedule or metric"),
]
INK, SOFT, LINE = "#1f2937", "#6b7280", "#94a3b8"
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b"]
WIDTH, BOX, GAP, TOP = 1000, 164, 30, 34


def box(index: int) -> str:
    """One verb: its name, who does it, and what it does."""
    verb, part, first, second = VERBS[index]
    x = 30 + index * (BOX + GAP)
    colour = COLOURS[index]
    texts = [
        (TOP + 32, 22, "700", colour, verb),
        (TOP + 56, 14, "600", INK, part),
        (TOP + 82, 13, "400", SOFT, first),
        (TOP + 100, 13, "400", SOFT, second),
    ]
    middle = x + BOX / 2
    lines = "".join(
        f'<text x="{middle}" y="{y}" font-size="{size}" font-weight="{weight}" fill="{fill}">{text}</text>'
        for y, size, weight, fill, text in texts
    )
    frame = f'x="{x}" y="{TOP}" width="{BOX}" height="118" rx="12" fill="#fff" stroke="{colour}" stroke-width="2"'
    return f"<rect {frame}/>{lines}"


def arrows() -> str:
    """The rollout from verb to verb, and the knobs back to the start."""
    y = TOP + 59
    forward = "".join(
        f'<path d="M{30 + (i + 1) * BOX + i * GAP + 4} {y} h{GAP - 12}" stroke="{LINE}" stroke-width="2.5" '
        'marker-end="url(#tip)"/>'
        for i in range(4)
    )
    left, right, bottom = 30 + BOX / 2, 30 + 4 * (BOX + GAP) + BOX / 2, TOP + 118
    back = (
        f'<path d="M{right} {bottom} v34 q0 12 -12 12 H{left + 12} q-12 0 -12 -12 v-26" fill="none" stroke="{LINE}" '
        'stroke-width="2.5" marker-end="url(#tip)"/>'
    )
    label = (
        f'<rect x="330" y="{bottom + 32}" width="340" height="28" rx="14" fill="#f1f5f9"/>'
        f'<text x="500" y="{bottom + 51}" font-size="14" fill="{INK}">one Rollout flows right; knobs flow back</text>'
    )
    return forward + back + label


def main() -> None:
    """Write the picture beside this file."""
    tip = (
        '<marker id="tip" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="6" markerHeight="6" orient="auto">'
        f'<path d="M0 0 L10 5 L0 10 z" fill="{LINE}"/></marker>'
    )
    body = "".join(box(i) for i in range(5)) + arrows()
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} 226" font-family="system-ui, sans-serif" '
        f'text-anchor="middle"><defs>{tip}</defs><rect width="{WIDTH}" height="226" rx="14" fill="#fafafa"/>'
        f"{body}</svg>\n"
    )
    Path(__file__).with_name("loop.svg").write_text(svg)


if __name__ == "__main__":
    main()
