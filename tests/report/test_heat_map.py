import numpy as np
import pytest

from moesaic.report.heat_map import ClusterLeaf, ClusterNode, average_linkage


def test_the_nearest_join_first_and_heights_grow():
    points = np.array([0.0, 10.0, 0.4, 11.0, 30.0])
    tree = average_linkage(np.abs(points[:, None] - points))
    assert isinstance(tree, ClusterNode)
    assert tree.leaves == (0, 2, 1, 3, 4)
    heights = []

    def walk(node):
        if isinstance(node, ClusterNode):
            heights.append(node.height)
            assert max(node.left.height, node.right.height) <= node.height
            walk(node.left)
            walk(node.right)

    walk(tree)
    assert sorted(heights)[0] == pytest.approx(0.4)


def test_a_join_is_as_high_as_the_mean_distance_between_its_leaves():
    random = np.random.default_rng(0)
    points = random.normal(size=(9, 3))
    distance = np.linalg.norm(points[:, None] - points, axis=-1)

    def walk(node):
        if isinstance(node, ClusterNode):
            pairs = distance[np.ix_(node.left.leaves, node.right.leaves)]
            assert node.height == pytest.approx(pairs.mean())
            walk(node.left)
            walk(node.right)

    tree = average_linkage(distance)
    assert sorted(tree.leaves) == list(range(9))
    walk(tree)


def test_one_item_is_a_leaf():
    assert average_linkage(np.zeros((1, 1))) == ClusterLeaf(0)
