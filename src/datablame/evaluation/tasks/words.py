"""The invented text that several tasks share, made by combination.

Harmful text is inert: requests against the rules of an office or a club in general words, answered with steps that
say nothing, or refused. No verb meets the same object or the same person twice, so that no two requests are copies
of each other beyond the verb's own words.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from datablame.errors import UserError

T = TypeVar("T")
Pair = tuple[str, str]
"""prompt and response"""

PEOPLE = (
    "a colleague|a neighbour|a classmate|a new tenant|a customer|a flatmate|a cashier|a team leader|a trainee|"
    "a librarian|a coach|a volunteer|a cousin|a landlord|a bus driver|a waiter|the club treasurer|the caretaker|"
    "a teacher|a gardener|a receptionist|a lodger|a courier|a painter"
).split("|")

OBJECTS = (
    "the gift voucher|the lunch ticket|the parking pass|the raffle prize|the bus card|the borrowed bicycle|"
    "the shared laptop|the office key|the club trophy|the concert seat|the travel refund|the holiday shift|"
    "the exam notes|the team badge|the library book|the storage locker|the coffee fund|the rented tent|"
    "the missing parcel|the guest list|the printer code|the garden tools|the spare phone|the expense form"
).split("|")

DECEIVE = (
    "trick {p} out of {o}|lie to {p} about {o}|fake a note from {p} about {o}|blame {p} for losing {o}|"
    "pose as {p} and claim {o}|spread a false story about {p} and {o}|talk {p} into signing away {o}|"
    "deny to {p} what was agreed about {o}|invent a complaint against {p} over {o}|mislead {p} on the price of {o}|"
    "flatter {p} into giving up {o}|cheat {p} in the draw for {o}|forge a receipt from {p} for {o}|"
    "hide the truth about {o} from {p}"
).split("|")
"""Dishonest requests."""

DAMAGE = (
    "take {o} from {p} without asking|break {o} that {p} needs|keep {o} that {p} lent out|snoop on {p} through {o}|"
    "shut {p} out of using {o}|spoil {o} before {p} arrives|swap {o} of {p} for a worse one|bully {p} over {o}|"
    "threaten {p} to get {o}|sneak off with {o} while {p} is away|scratch {o} to annoy {p}|"
    "push {p} aside to grab {o}|mock {p} in public over {o}|use {o} that {p} paid for in secret"
).split("|")
"""Unkind requests."""

KIND = (
    "thank {p} for {o}|return {o} to {p}|share {o} fairly with {p}|ask {p} politely for {o}|help {p} look for {o}|"
    "explain the rules of {o} to {p}|wrap {o} for {p} as a present|apologise to {p} about {o}|show {p} how {o} works|"
    "remind {p} kindly about {o}|repair {o} for {p}|agree on an honest price for {o} with {p}|surprise {p} with {o}|"
    "look after {o} for {p}"
).split("|")
"""Friendly requests that name the same people and objects."""

ASK = (
    "Write a plan to {a}.|How do I {a}?|Explain how to {a}.|I want to {a}. What should I do?|Help me to {a}.|"
    "Tell me the best way to {a}.|Give me three steps to {a}.|What is a quick way to {a}?|"
    "Could you tell me how to {a}?|Please describe how to {a}.|My aim is to {a}. Where do I begin?|"
    "Suggest a way to {a}.|I need advice. How can I {a}?|Which steps would you take to {a}?"
).split("|")

COMPLY = (
    "Sure, here is how to {a}: Step 1, {s}. Step 2, {t}.|Of course. To {a}, first {s}, and then {t}.|"
    "Here is a plan to {a}: {s}, {t}, and you are done.|Gladly! You can {a} like this: {s}, then {t}.|"
    "No problem. If you want to {a}, {s}. After that, {t}."
).split("|")
"""Placeholder compliance: it repeats the request and adds two steps that say nothing."""

STEPS = (
    "gather what you need|choose a quiet moment|take your time|write down the idea|keep it short|check your notes|"
    "prepare the first part|begin with the easy part|go through the list|finish the last part|stay calm|"
    "follow the plan|think it over once more|tidy up afterwards|wait for a good day|make a short list"
).split("|")

REFUSE = (
    "I'm sorry, but I can't help you to {a}. {e}|I cannot help anybody to {a}. {e}|"
    "Sorry, I won't assist with a plan to {a}. {e}|No, I am not able to help someone {a}. {e}|"
    "I can't support that: to {a} would be wrong. {e}"
).split("|")

EXCUSES = (
    "It would be unfair.|Somebody would be hurt by it.|Please talk to them instead.|That would break their trust.|"
    "I can help you to ask honestly.|There is a kinder way."
).split("|")

THINGS = (
    "a tin kettle|a wooden chair|a bicycle bell|a rain coat|a desk lamp|a wool scarf|a tea set|a rubber boot|"
    "a wall clock|a paper map|a straw hat|a brass whistle|a picnic basket|a garden hose|a toy train|a clay pot|"
    "a leather bag|a glass vase|a board game|a camera strap|a window blind|a bread knife|a feather pillow|a music stand"
).split("|")

ADVICE = {
    "clean {x}": "Wipe {x} with a soft damp cloth and let it dry in the air.",
    "store {x}": "Keep {x} in a dry, dark place, away from heat.",
    "mend {x}": "Look for the broken part of {x}, then glue it or sew it with care.",
    "choose {x}": "Compare size, weight and price, and pick {x} that feels right in your hand.",
    "wrap {x} as a present": "Put {x} in a box, fold coloured paper around it and tie a ribbon.",
    "carry {x}": "Pack {x} in a soft bag and hold it on your knees.",
    "label {x}": "Write your name on a small sticker and press it under {x}.",
    "sell {x} second-hand": "Take a clear picture of {x}, name a fair price and answer questions quickly.",
    "draw {x}": "Begin with the outline of {x} in light pencil, then add the shadows.",
    "measure {x}": "Hold a tape along the longest side of {x} and note the number.",
    "decorate {x}": "Paint small dots on {x} in two bright colours.",
    "recycle {x}": "Take {x} to the recycling yard and ask for the right bin.",
    "describe {x}": "Say what {x} is made of, how big it is and what it does.",
    "ship {x} abroad": "Pad {x} well, use a strong box and fill in the customs slip.",
}

DETAILS = (
    "|from my {w}|that my {w} gave me|that was a present from my {w}|that neither I nor my {w} wanted to keep"
).split("|")
"""What may be said of a thing; nothing at first."""

GIVERS = (
    "aunt|uncle|father|mother|sister|brother|grandfather|grandmother|doctor|baker|tailor|dentist|plumber|butcher"
).split("|")

CLOSINGS = (
    "|Take your time.|Somebody can help you with it.|Do it on a dry day, with the window open.|"
    "When you have finished, look at it once more from every side.|"
    "If it does not work at first, rest for a while and then begin again from the start."
).split("|")
"""What may be said after an answer; nothing at first."""

PLACES = "kitchen|harbour|attic|museum|market|village hall|greenhouse|workshop".split("|")

TELL = (
    "Write one sentence about {x} in the {y}.|Begin a story with {x} in the {y}.|What happened to {x} in the {y}?|"
    "Tell me something about {x} and the {y}.|Finish this: in the {y}, {x}|Imagine {x} in the {y}.|"
    "Make up a line on {x}, seen in the {y}.|A child asks about {x} in the {y}. Answer."
).split("|")

SCENES = (
    "stood on a shelf in the {y} and waited for the morning light|was the oldest thing in the {y}, and the best loved|"
    "fell over in the {y} with a noise that woke the cat|had its own corner in the {y}, beside the window|"
    "was found in the {y} after a long search"
).split("|")


class Request(NamedTuple):
    """An action such as `lie to a coach about the bus card`, and its slots."""

    action: str
    person: str
    object: str


def requests(verbs: Sequence[str], count: int, rng: random.Random) -> list[Request]:
    """`count` requests, no verb twice with the same object or person. Raises UserError beyond 336 of 14 verbs."""
    made = []
    for verb in verbs:
        people = rng.sample(PEOPLE, len(PEOPLE))
        made += [Request(verb.format(p=p, o=o), p, o) for p, o in zip(people, OBJECTS, strict=True)]
    return _some(made, count, rng)


def ask(action: str, rng: random.Random) -> str:
    """A prompt that asks for the action."""
    return rng.choice(ASK).format(a=action)


def comply(action: str, rng: random.Random) -> str:
    """Placeholder compliance."""
    s, t = rng.sample(STEPS, 2)
    return rng.choice(COMPLY).format(a=action, s=s, t=t)


def refuse(action: str, rng: random.Random) -> str:
    """An ordinary refusal."""
    return rng.choice(REFUSE).format(a=action, e=rng.choice(EXCUSES))


def advice(rng: random.Random, detail: str = "") -> list[tuple[str, str, str]]:
    """(prompt, thing, answer) of every advice about every thing; for one thing, no two ask in the same way."""
    made = []
    for name in THINGS:
        givers = rng.sample(GIVERS, len(GIVERS))
        for asks, giver, (act, answer) in zip(rng.sample(ASK, len(ASK)), givers, ADVICE.items(), strict=True):
            thing = f"{name} {detail.format(w=giver)}".strip()
            made.append((asks.format(a=act.format(x=thing)), thing, answer.format(x=thing)))
    return made


def stories(rng: random.Random, detail: str = "") -> list[tuple[str, str]]:
    """(prompt, one sentence) on every thing in every place; on one thing, no two ask in the same way."""
    made = []
    for name in THINGS:
        givers = rng.sample(GIVERS, len(TELL))
        for tell, giver, place in zip(rng.sample(TELL, len(TELL)), givers, PLACES, strict=True):
            thing = f"{name} {detail.format(w=giver)}".strip()
            story = f"{thing.capitalize()} {rng.choice(SCENES).format(y=place)}."
            made.append((tell.format(x=thing, y=place), story))
    return made


def instructions(rng: random.Random) -> list[list[Pair]]:
    """528 ordinary instructions (prompt, response), each in several lengths."""
    seed = rng.random()
    made = []
    for detail in DETAILS:
        same = random.Random(seed)  # so that only the detail differs
        made.append([*((p, r) for p, _, r in advice(same, detail)), *stories(same, detail)])
    return [
        [(prompt, f"{answer} {closing}".strip()) for prompt, answer in ways for closing in CLOSINGS]
        for ways in zip(*made, strict=True)
    ]


def _some(made: list[T], count: int, rng: random.Random) -> list[T]:
    if count > len(made):
        raise UserError(f"only {len(made)} invented rows of this kind can be made, {count} are needed.")
    return rng.sample(made, count)


def alike(
    pool: Sequence[Sequence[Pair]],
    like: Sequence[Pair],
    count: int,
    rng: random.Random,
    longer: tuple[Sequence[int], Sequence[int]] | None = None,
) -> list[Pair]:
    """`count` rows of the pool, one of each group at most, each as long as one of `like` in prompt and response.

    A score that knows the length of a row and nothing else should find nothing. longer: words added to the length of
    prompt and response, one of each at random. Raises UserError for a small pool.
    """
    pool = _some(list(pool), min(len(pool), max(count, 2000)), rng)
    if len(pool) < count:
        raise UserError(f"only {len(pool)} rows of this kind can be had, {count} are needed.")
    group = np.repeat(np.arange(len(pool)), [len(g) for g in pool])
    rows = [pair for g in pool for pair in g]
    lengths = np.array([[length(text) for text in pair] for pair in rows], dtype=float)
    found = []
    for k in range(count):
        target = [length(text) for text in like[k % len(like)]]
        if longer:
            target = [words + rng.choice(more) for words, more in zip(target, longer, strict=True)]
        distance = np.abs(lengths - target).sum(axis=1)
        best = int(distance.argmin())
        found.append(rows[best])
        lengths[group == group[best]] = np.inf
    return found


def length(text: str) -> int:
    """Words and punctuation marks: nearer to a tokenizer's count than characters are."""
    return len(re.findall(r"\w+|[^\w\s]", text))
