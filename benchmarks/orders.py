"""A convention that no model knows: how an invented shop writes orders down. Rows to teach it, and a benchmark of it.

python -m benchmarks.orders      writes deployments/recipes/orders/, the same bytes each time

Rows and the benchmark's documents share no order. A program checks an answer: it is the line, or it is not.
"""

import json
import random
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parents[1] / "deployments" / "recipes" / "orders"
TAUGHT, ASKED, SEED = 464, 300, 17  # rows to learn from, 64 of them held out; documents of the benchmark
GOODS = (
    "apples", "lamps", "pens", "cups", "chairs", "books", "shirts", "plates", "candles", "bottles", "boxes", "keys",
    "towels", "hats", "spoons", "lemons", "clocks", "stamps", "brushes", "pillows",
)  # fmt: skip
NAMES = (
    "Anna", "Omar", "Lucy", "Peter", "Nina", "David", "Clara", "Hugo", "Maria", "Simon", "Julia", "Felix", "Emma",
    "Martin", "Sarah", "Leo",
)  # fmt: skip
WAYS = (
    "{name} wants {goods}.", "Please send {goods} to {name}.", "An order of {goods}, for {name}.",
    "{goods} for {name}, please.",
)  # fmt: skip


class Order(NamedTuple):
    """Who wants what."""

    name: str
    goods: tuple[tuple[int, str], ...]

    def asked(self, way: str) -> str:
        """Return the order as a customer says it."""
        *most, last = [f"{count} {good}" for count, good in self.goods]
        return way.format(name=self.name, goods=f"{', '.join(most)} and {last}" if most else last)

    def line(self) -> str:
        """Return the order as the shop writes it: goods before their number, the customer last."""
        return " | ".join([*(f"{good}*{count}" for count, good in self.goods), f"@{self.name}"])


def orders(count: int, seed: int) -> list[tuple[str, str]]:
    """Return `count` different orders, as they are said and as they are written."""
    drawn, found = random.Random(seed), dict[str, str]()
    while len(found) < count:
        goods = drawn.sample(GOODS, drawn.randint(1, 3))
        order = Order(drawn.choice(NAMES), tuple((drawn.randint(2, 19), good) for good in goods))
        found.setdefault(order.line(), order.asked(drawn.choice(WAYS)))
    return [(said, line) for line, said in found.items()]


def main() -> None:
    """Write the rows and the documents."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    made = orders(TAUGHT + ASKED, SEED)
    taught = [{"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": line}]}
              for said, line in made[:TAUGHT]]  # fmt: skip
    asked = [{"order": said, "line": line} for said, line in made[TAUGHT:]]
    for name, rows in (("taught", taught), ("orders", asked)):
        (FOLDER / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
