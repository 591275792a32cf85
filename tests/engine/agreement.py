"""Did two backends give the same tokens, as far as rounding lets them?"""

from collections.abc import Sequence
from dataclasses import dataclass

from tests.engine.engine import Answers

# Of the answers, so many at least are the same to the last token. In bfloat16 a token of a hundred
# is a near tie, and breaking it either way parts all that follow: four of five are the same.
LEAST_IDENTICAL = 0.5
# A margin is the difference of two logprobs; and the largest of some hundred differences between
# logprobs is not the largest there can be: twice that.
MARGIN = 4
# How far apart two right answers in float32 may be, in units of the largest difference between
# Transformers' own logprobs in float32 and in float64. 2, as each side may be off by that much.
# Times 4, for three reasons: the other side sums in another order, with whatever instructions the
# processor has; the largest of some thousand differences is not the largest there can be; and
# Transformers computes norms, angles and the softmax in float32 even in a float64 model (float64
# throughout was up to 2.6 times as far from float32).
FLOAT32 = 8


def float32_rounding(single_from_double: float) -> float:
    """How far apart rounding puts the logprobs of two right answers in float32.

    single_from_double: the largest difference of a logprob in float32 from its float64 value.
    """
    return FLOAT32 * single_from_double


def rounding(reference: Answers, jittered: Answers) -> float:
    """How far apart rounding puts the margins of two right answers.

    jittered: the reference's own run with its attention moved in the last place, so that nothing
    of the backend under test enters, and what layers make of small errors does.
    """
    return MARGIN * compare(jittered, reference, float("inf")).apart


@dataclass(frozen=True)
class Parting:
    """Where an answer's tokens first differ, by how much each backend preferred its own, and how
    often that answer was given."""

    prompt: int
    step: int
    token: int
    expected: int
    margin: float
    expected_margin: float
    times: int


@dataclass(frozen=True)
class Agreement:
    """answers, identical: how many, and how many of them to the last token. compared: tokens up to
    each answer's parting. prompt_compared: tokens of prompts whose logprobs both sides have.
    apart: the largest difference in logprob of these all. bound: how near a tie has to be to be
    broken differently."""

    answers: int
    identical: int
    compared: int
    prompt_compared: int
    apart: float
    bound: float
    partings: list[Parting]

    def unlike(self) -> bool:
        """Whether a token differs, or a logprob by more than rounding explains."""
        return self.identical < self.answers or self.apart > self.bound

    def problems(self) -> list[str]:
        """What rounding does not explain, in words; empty if it explains all."""
        if not self.compared:
            return ["nothing was compared"]
        found = [
            f"prompt {p.prompt}, step {p.step}: {p.token} by {p.margin:.2e}, expected {p.expected}"
            f" by {p.expected_margin:.2e}, bound {self.bound:.2e}"
            for p in self.partings
            if max(p.margin, p.expected_margin) > self.bound
        ]
        if self.apart > self.bound:
            found.append(f"logprobs {self.apart:.2e} apart, bound {self.bound:.2e}")
        if self.identical < LEAST_IDENTICAL * self.answers:
            found.append(f"{self.identical} of {self.answers} answers alike to the last token")
        return found


def chosen(answers: Answers, prompts: Sequence[int]) -> Answers:
    """The answers to some prompts, each answered once, numbered anew."""
    return Answers(
        prompts=list(range(len(prompts))),
        times=[1] * len(prompts),
        tokens=[answers.tokens[index] for index in prompts],
        logprobs=[answers.logprobs[index] for index in prompts],
        margins=[answers.margins[index] for index in prompts],
        prompt_logprobs=[
            answers.prompt_logprobs[index] for index in prompts if answers.prompt_logprobs
        ],
    )


def compare(report: Answers, reference: Answers, bound: float) -> Agreement:
    """A run's answers beside those of another, which answered each of the prompts."""
    compared, prompt_compared, identical, apart, partings = 0, 0, 0, 0.0, []
    rows = {prompt: row for row, prompt in enumerate(reference.prompts)}
    for ours, (prompt, times) in enumerate(zip(report.prompts, report.times, strict=True)):
        theirs = rows[prompt]
        tokens, expected = report.tokens[ours], reference.tokens[theirs]
        # A run that was to make fewer tokens is compared as far as it goes.
        differs = [a != b for a, b in zip(tokens, expected, strict=False)]
        same = differs.index(True) if any(differs) else len(differs)
        pairs = [*zip(report.logprobs[ours][:same], reference.logprobs[theirs][:same], strict=True)]
        if report.prompt_logprobs and reference.prompt_logprobs:
            given = report.prompt_logprobs[ours], reference.prompt_logprobs[theirs]
            pairs += zip(*given, strict=True)
            prompt_compared += len(given[0])
        apart = max([apart, *(abs(a - b) for a, b in pairs)])
        compared += same
        if same == len(differs):
            identical += times
            continue
        margins = (report.margins[ours][same], reference.margins[theirs][same])
        partings.append(Parting(prompt, same, tokens[same], expected[same], *margins, times))
    return Agreement(
        sum(report.times), identical, compared, prompt_compared, apart, bound, partings
    )
