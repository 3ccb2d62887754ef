"""Heat maps of expert use by language, and the dendrogram of languages beside them.

The color of a cell is the log2 ratio of a language's use of an expert to uniform use: blue above,
red below, one shade per step. Cells of one shade are one SVG path, so that a map of twenty thousand
cells stays small. The dendrogram is average-linkage clustering (UPGMA, Sokal and Michener 1958).

Letters: E experts, G languages (leaves).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesaic.report.charts import AxisScale, svg, svg_text
from moesaic.report.html import Html, tag

SHADES = 6  # of each color
ROW_HEIGHT = 24
_LOG2_RATIO_CHOICES = (0.5, 1, 2, 3)  # of the strongest shade


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
    """Two clusters joined at the distance ``height``. ``leaves`` is their order in a picture."""

    left: "ClusterTree"
    right: "ClusterTree"
    height: float
    leaves: tuple[int, ...]


ClusterTree = ClusterLeaf | ClusterNode


def average_linkage(distance: np.ndarray) -> ClusterTree:
    """Join the two nearest clusters until one is left; of ties, the earlier items. O(G^3).

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
    """Put the cluster with the earliest item first, for the same order in pictures of all runs."""
    left, right = (one, other) if min(one.leaves) < min(other.leaves) else (other, one)
    return ClusterNode(left, right, height, left.leaves + right.leaves)


@dataclass(frozen=True, slots=True)
class ExpertHeatMap:
    """Heat map of ``share`` [E, G], p(expert | language), with languages in the order ``rows``.

    The strongest shade is that of ``max_log2_ratio`` doublings of uniform use; ``cell`` is the
    width of a cell in pixels.
    """

    layer: str
    share: np.ndarray
    rows: Sequence[int]
    names: Sequence[str]
    max_log2_ratio: float = 3.0
    cell: int = 24

    def shades(self) -> np.ndarray:
        """Return the shade of each cell, int [E, G] in -SHADES..SHADES; 0 is uniform use."""
        with np.errstate(divide="ignore"):
            doublings = np.log2(self.share / (1 / self.share.shape[0]))
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
            svg_text(e, x=e * cell + cell / 2, y=15, anchor="middle")
            for e in range(0, experts, every)
        ]
        width, height = experts * cell, (len(self.rows) + 1) * ROW_HEIGHT
        ground = tag(
            "rect", x=0, y=ROW_HEIGHT, width=width, height=height - ROW_HEIGHT, class_="ground"
        )
        permille = np.rint(1000 * self.share[:, list(self.rows)].T).astype(int).tolist()
        return svg(
            f"Use of the experts of {self.layer} by language",
            ground,
            *numbers,
            *paths,
            size=(width, height),
            width=width,
            height=height,
            class_="heat",
            data_cell=cell,
            data_row=ROW_HEIGHT,
            data_share=str(permille).replace(" ", ""),
        )


def choose_max_log2_ratio(shares: Sequence[np.ndarray]) -> float:
    """Return the smallest choice that covers 95 % of the cells of all maps [E, G]."""
    with np.errstate(divide="ignore"):
        sizes = [np.abs(np.log2(share * share.shape[0])).ravel() for share in shares]
    needed = float(np.quantile(np.minimum(np.concatenate(sizes), 9.0), 0.95))
    choices = _LOG2_RATIO_CHOICES
    return next((ratio for ratio in choices if ratio >= needed), choices[-1])


def heat_map_legend(max_log2_ratio: float) -> Html:
    """Draw the shades with their ratios to uniform use."""
    cell, most = 22, 2**max_log2_ratio
    box: dict[str, float] = {"y": 0, "width": cell - 1, "height": 12}
    parts = []
    for i, shade in enumerate(range(-SHADES, SHADES + 1)):
        kind = "more" if shade > 0 else "less" if shade < 0 else "ground"
        strength = round(0.1 + 0.9 * abs(shade) / SHADES, 2) if shade else None
        parts.append(tag("rect", x=i * cell, class_=kind, fill_opacity=strength, **box))
    middle = (SHADES + 0.5) * cell
    words = (
        (0, "start", f"{1 / most:.2g}× or less"),
        (middle, "middle", "uniform use"),
        (2 * middle, "end", f"{most:.2g}× or more"),
    )
    parts += [svg_text(text, x=x, y=27, anchor=anchor) for x, anchor, text in words]
    title, size = "Colors: use of an expert relative to uniform use", (2 * middle, 32)
    return svg(title, *parts, size=size, width=size[0], height=size[1], class_="heat-key")


def dendrogram(tree: ClusterTree, *, names: Sequence[str], width: int = 110) -> Html:
    """Draw the tree with its root on the left, its languages level with the rows of a heat map."""
    order = tree.leaves
    scale = AxisScale(tree.height or 1.0, 0.0, 6, width)
    lines: list[str] = []

    def add_lines(node: ClusterTree) -> float:
        if not isinstance(node, ClusterNode):
            return (order.index(node.index) + 1.5) * ROW_HEIGHT
        ends = [(child.height, add_lines(child)) for child in (node.left, node.right)]
        x = scale(node.height)
        lines.append("".join(f"M{scale(h)} {y}H{x}" for h, y in ends) + f"V{ends[0][1]}")
        return (ends[0][1] + ends[1][1]) / 2

    add_lines(tree)
    label = 8 + round(7.2 * max(len(names[g]) for g in order))
    texts = [
        svg_text(names[g], x=width + 8, y=(i + 1.5) * ROW_HEIGHT + 4, anchor=None, class_="name")
        for i, g in enumerate(order)
    ]
    size = (width + label, (len(order) + 1) * ROW_HEIGHT)
    path = tag("path", d="".join(lines), class_="tree")
    title = "Languages clustered by the similarity of their routing"
    return svg(title, path, *texts, size=size, width=size[0], height=size[1], class_="dendrogram")
