"""A decision while it is made: takes the place of an `Answer`, and is over with the first logits."""

from __future__ import annotations

import numpy as np

from vtp.engines import VtpError
from vtp.runtime.bundle.manifest import Manifest
from vtp.runtime.decisions.decision import Decision, Weighed, weigh
from vtp.runtime.decisions.labels import label_tokens
from vtp.runtime.decisions.question import Question
from vtp.runtime.generation.answer import Answer
from vtp.runtime.generation.loop import prefill
from vtp.runtime.generation.request import Request
from vtp.runtime.generation.sampling import check_finite
from vtp.runtime.generation.stopping import Interrupted
from vtp.runtime.prompt.prompter import Prompter
from vtp.runtime.stages.runner import StageRunner

DECIDED = "decided"  # the finish reason of the result that goes with it


class DecisionAnswer(Answer):
    """A question's answers, weighed by the logits of the prompt's last place; `result` has no text."""

    def __init__(
        self, request: Request, manifest: Manifest, prompter: Prompter, question: Question, heat: float
    ) -> None:
        super().__init__(request, manifest, prompter)
        self._question, self._heat = question, heat
        self._tokens = label_tokens(question, prompter)
        self._weighed: Weighed | None = None

    def take(self, logits: np.ndarray, room: int) -> tuple[str, bool]:
        """Decide, by logits [V]: no text comes, and it is over."""
        check_finite(logits)
        self._weighed = weigh(logits, self._question, self._tokens, self._heat)
        timings = self.result.timings
        timings.ttft = timings.total = self.request.clock.ms
        self.result.finish_reason = DECIDED
        return "", True

    @property
    def decision(self) -> Decision:
        """What was decided; VtpError if it was cancelled, or its time was over, before that."""
        result, weighed = self.result, self._weighed
        if weighed is None:
            raise VtpError(f"nothing was decided ({result.finish_reason}); ask again, with more time")
        return Decision(
            kind=self._question.kind,
            probabilities=weighed.probabilities,
            answer=weighed.answer,
            score=weighed.score(self._question.kind),
            label_mass=weighed.label_mass,
            visual_tokens=result.visual_tokens,
            kept=result.kept,
            prompt_tokens=result.prompt_tokens,
            timings=result.timings,
            tower=result.tower,
        )


def decide(runner: StageRunner, answer: DecisionAnswer) -> Decision:
    """Run the image and prompt stages, and no step."""
    request = answer.request
    try:
        request.load()
        request.stop_signal.check()
        answer.take(prefill(runner, answer), 0)
    except Interrupted as error:
        answer.interrupt(error.reason)
    return answer.decision
