"""What a completion request asks of a search: transformers' fields, and what does not go with them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cluster.request import Beams, EarlyStopping
from deploy.request_fields import Body, Count, Int31

MAX_LENGTH_PENALTY = 10  # scores stay finite


class BeamFields(Body):
    num_beams: Count = 1
    num_return_sequences: Count | None = None
    length_penalty: Annotated[float, Field(ge=-MAX_LENGTH_PENALTY, le=MAX_LENGTH_PENALTY)] = 1.0
    early_stopping: bool | Literal["never"] = False
    no_repeat_ngram_size: Int31 = 0

    @property
    def searches(self) -> bool:
        return self.num_beams > 1

    def beams(self, num_returned: int) -> Beams | None:
        if not self.searches:
            return None
        early = EarlyStopping.IMPOSSIBLE
        if self.early_stopping != "never":
            early = EarlyStopping.AT_ONCE if self.early_stopping else EarlyStopping.UNLIKELY
        return Beams(self.num_beams, num_returned, self.length_penalty, early)
