"""Clusters: average-linkage trees of a distance matrix (Sokal and Michener 1958, UPGMA).

Letters: G leaves.

Heat maps of routing, and the tree of languages beside them.

A cell says how much a language uses an expert, against its fair share: blue for more, red for less,
stronger for further away (doubling or halving each time). Equal shades are one SVG path, so that
a map of twenty thousand cells stays small.

Letters: E experts, G languages.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesaic.report.charts import AxisScale
from moesaic.report.html import Html, tag


@dataclass(frozen=True, slots=True)
class ClusterLeaf:
    """One item of the distance matrix."""

    index: int

    @property
    def height(self) -> float:
        return 0.0

    @property
    def leaves(self) -> tuple[int, ...]:
        return (self.index,)


@dataclass(frozen=True, slots=True)
class ClusterNode:
    """Two trees that meet at a distance. ``leaves`` is the order in which a picture shows them."""

    left: "ClusterTree"
    right: "ClusterTree"
    height: float
    leaves: tuple[int, ...]


ClusterTree = ClusterLeaf | ClusterNode


def average_linkage(distance: np.ndarray) -> ClusterTree:
    """Join the nearest two trees until one is left; ties go to the earlier items. O(G^3).

    ``distance`` is [G, G], symmetric, G >= 1.
    """
    trees: list[ClusterTree] = [ClusterLeaf(i) for i in range(len(distance))]
    between = np.array(distance, dtype=np.float64)
    np.fill_diagonal(between, np.inf)
    while len(trees) > 1:
        a, b = sorted(int(i) for i in divmod(int(np.argmin(between)), len(trees)))
        height = float(between[a, b])
        sizes = len(trees[a].leaves), len(trees[b].leaves)
        merged = (between[a] * sizes[0] + between[b] * sizes[1]) / sum(sizes)
        joined = _merge_clusters(trees[a], trees[b], height=height)
        between[a], between[:, a] = merged, merged
        between[a, a] = np.inf
        between = np.delete(np.delete(between, b, axis=0), b, axis=1)
        trees[a] = joined
        del trees[b]
    return trees[0]


def _merge_clusters(one: ClusterTree, other: ClusterTree, *, height: float) -> ClusterNode:
    """Put the tree that holds the earliest item first, so that pictures of runs look alike."""
    left, right = (one, other) if min(one.leaves) < min(other.leaves) else (other, one)
    return ClusterNode(left, right, height, left.leaves + right.leaves)


SHADES = 6  # steps of each colour


ROW_HEIGHT = 24


_LOG2_RATIO_CHOICES = (
    0.5,
    1,
    2,
    3,
)  # doublings at the strongest shade: chosen to suit what is shown


@dataclass(frozen=True, slots=True)
class ExpertHeatMap:
    """``share`` [E, G] is p(expert | language); languages are shown in the order ``rows``.

    The strongest shade is at ``reach`` doublings of the fair share; ``cell`` is a cell's width.
    """

    layer: str
    share: np.ndarray
    rows: Sequence[int]
    names: Sequence[str]
    max_log2_ratio: float = 3.0
    cell: int = 24

    def shades(self) -> np.ndarray:
        """Return the shade of each cell, int [E, G] in -SHADES..SHADES; 0 is the fair share."""
        fair = 1 / self.share.shape[0]
        with np.errstate(divide="ignore"):
            doublings = np.log2(self.share / fair)
        return np.rint(np.clip(doublings / self.max_log2_ratio, -1, 1) * SHADES).astype(int)

    def render(self) -> Html:
        """Draw rows of ``ROW_HEIGHT`` pixels under a row of expert numbers."""
        experts = self.share.shape[0]
        cell = self.cell
        every = max(1, round(22 / cell))
        shades = self.shades()
        paths = []
        for shade in [s for s in range(-SHADES, SHADES + 1) if s]:
            spots = [
                f"M{e * cell} {(i + 1) * ROW_HEIGHT}h{cell - 1}v{ROW_HEIGHT - 1}h-{cell - 1}z"
                for i, g in enumerate(self.rows)
                for e in range(experts)
                if shades[e, g] == shade
            ]
            if spots:
                kind = "more" if shade > 0 else "less"
                strength = round(0.1 + 0.9 * abs(shade) / SHADES, 2)
                paths.append(tag("path", d="".join(spots), class_=kind, fill_opacity=strength))
        numbers = [
            tag("text", e, x=e * cell + cell / 2, y=15, text_anchor="middle", class_="axis")
            for e in range(0, experts, every)
        ]
        width, height = experts * cell, (len(self.rows) + 1) * ROW_HEIGHT
        ground = tag(
            "rect", x=0, y=ROW_HEIGHT, width=width, height=height - ROW_HEIGHT, class_="ground"
        )
        told = [[round(1000 * float(self.share[e, g])) for e in range(experts)] for g in self.rows]
        return tag(
            "svg",
            tag("title", f"Use of the experts of {self.layer} by language"),
            ground,
            *numbers,
            *paths,
            viewBox=f"0 0 {width} {height}",
            width=width,
            height=height,
            class_="heat",
            role="img",
            data_cell=cell,
            data_row=ROW_HEIGHT,
            data_share=str(told).replace(" ", ""),
        )


def choose_max_log2_ratio(shares: Sequence[np.ndarray]) -> float:
    """Return the reach that shows nearly all of some maps [E, G] without running out of shades."""
    with np.errstate(divide="ignore"):
        sizes = [np.abs(np.log2(share * share.shape[0])).ravel() for share in shares]
    wanted = float(np.quantile(np.minimum(np.concatenate(sizes), 9.0), 0.95))
    return next(
        (reach for reach in _LOG2_RATIO_CHOICES if reach >= wanted), _LOG2_RATIO_CHOICES[-1]
    )


def heat_map_legend(max_log2_ratio: float) -> Html:
    """Draw the shades with what they mean."""
    cell, most = 22, 2**max_log2_ratio
    parts = []
    for i, shade in enumerate(range(-SHADES, SHADES + 1)):
        kind = "more" if shade > 0 else "less" if shade < 0 else "ground"
        strength = round(0.1 + 0.9 * abs(shade) / SHADES, 2) if shade else None
        parts.append(
            tag(
                "rect",
                x=i * cell,
                y=0,
                width=cell - 1,
                height=12,
                class_=kind,
                fill_opacity=strength,
            )
        )
    middle = (SHADES + 0.5) * cell
    words = (
        (0, "start", f"{1 / most:.2g}× or less"),
        (middle, "middle", "fair share"),
        (2 * middle, "end", f"{most:.2g}× or more"),
    )
    parts += [
        tag("text", text, x=x, y=27, text_anchor=anchor, class_="axis") for x, anchor, text in words
    ]
    return tag(
        "svg",
        tag("title", "Colours: use of an expert against its fair share"),
        *parts,
        viewBox=f"0 0 {2 * middle} 32",
        width=2 * middle,
        height=32,
        class_="heat-key",
        role="img",
    )


def dendrogram(tree: ClusterTree, *, names: Sequence[str], width: int = 110) -> Html:
    """Draw the tree with its root to the left and a language per row, level with a heat map's."""
    order = tree.leaves
    across = AxisScale(tree.height or 1.0, 0.0, 6, width)
    lines: list[str] = []

    def place(node: ClusterTree) -> float:
        if not isinstance(node, ClusterNode):
            return (order.index(node.index) + 1.5) * ROW_HEIGHT
        ends = [(child.height, place(child)) for child in (node.left, node.right)]
        x = across(node.height)
        lines.append("".join(f"M{across(h)} {y}H{x}" for h, y in ends) + f"V{ends[0][1]}")
        return (ends[0][1] + ends[1][1]) / 2

    place(tree)
    label = 8 + round(7.2 * max(len(names[g]) for g in order))
    texts = [
        tag("text", names[g], x=width + 8, y=(i + 1.5) * ROW_HEIGHT + 4, class_="name")
        for i, g in enumerate(order)
    ]
    height = (len(order) + 1) * ROW_HEIGHT
    return tag(
        "svg",
        tag("title", "Languages grouped by how alike their routing is"),
        tag("path", d="".join(lines), class_="tree"),
        *texts,
        viewBox=f"0 0 {width + label} {height}",
        width=width + label,
        height=height,
        class_="dendrogram",
        role="img",
    )
