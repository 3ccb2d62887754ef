"""Deal: which tokens of a batch each rank holds."""

from dataclasses import dataclass, replace

from moesaic.nn.packing import Division, Packing


@dataclass(frozen=True, slots=True)
class Deal:
    """``rank`` is this process's place among ``ranks`` that share a batch's rows."""

    rank: int
    ranks: int
    lanes: int = 1

    def __call__(self, packing: Packing) -> Packing:
        size, rest = divmod(packing.num_tokens, self.ranks)
        sizes = tuple(size + (rank < rest) for rank in range(self.ranks))
        return replace(packing, division=Division(sizes, self.rank, self.lanes))
