"""What a request asks of the sampler, read by the worker that is to do it."""

from __future__ import annotations

from cluster.errors import InvalidRequest
from cluster.protos import worker_pb2 as pb
from cluster.request import SamplingParams
from workers.engine.constraint import ConstraintCompiler


def checked_params(params: pb.SamplingParams, constraints: ConstraintCompiler | None) -> SamplingParams:
    """Raises InvalidRequest for what a later version means, and for a grammar that cannot be followed here. Token ids
    are the scheduler's to check."""
    try:
        asked = SamplingParams.of(params)
    except ValueError as error:
        raise InvalidRequest(f"sampling parameters that this worker does not know: {error}") from error
    if asked.grammar is not None:
        if constraints is None:
            raise InvalidRequest("this worker compiles no grammars; ask for free text", "grammar")
        constraints.check(asked.grammar)
    return asked
