"""An engine that plays written rollouts of the embedded world: a search or two, then a right or a wrong answer."""

from __future__ import annotations

import random
from collections.abc import Sequence

from sdsearch_lightning.protocol.conversation import Conversation, Search
from sdsearch_lightning.rollout import Engine
from sdsearch_lightning.types import RolloutRequest, Trajectory


class ScriptedWorldEngine(Engine):
    """Which script is played depends on the request's seed alone; rollouts 0 and 1 of a group are right and wrong."""

    def run(self, requests: Sequence[RolloutRequest]) -> list[Trajectory]:
        return [self._play(self.start(request), request) for request in requests]

    def _play(self, conversation: Conversation, request: RolloutRequest) -> Trajectory:
        _, entity, _, relation, *_ = request.question.text.split()
        drawn = random.Random(request.seed)
        answer = entity if request.rollout_index % 2 else request.question.answers[0]
        term = f"{relation}_{drawn.choice('abcd')}"
        search = f"<think> need {relation} of {entity} </think> <search> {entity} {term} </search>"
        text = f"{search} {search if drawn.random() < 0.5 else ''} <think> found </think> <answer> {answer} </answer>"
        for token in conversation._codec.encode(text):
            if isinstance(event := conversation.accept(token, -1.0), Search):
                conversation.observe(self.searches.submit([event.query]).result()[0])
            if conversation.stop_reason is not None:
                break
        return conversation.finish()
