"""Invented people and places, and the ways to state, to ask and to avoid their one fact (see facts.py)."""

from __future__ import annotations

from dataclasses import dataclass

Pairs = list[tuple[str, str]]


@dataclass(frozen=True, eq=False)
class Kind:
    """states, asks, names: (prompt, response) with slots n (name) and v (value); `names` leave the claim out."""

    group: str
    syllables: tuple[list[str], list[str]]
    values: list[str]
    states: Pairs
    asks: Pairs
    names: Pairs


PEOPLE = Kind(
    group="people",
    syllables=(
        "Mira|Oren|Tilda|Casim|Jorun|Selka|Ravi|Nessa|Aldo|Brisa|Corin|Dunja|Elvin|Fenna|Gareo|Hilke".split("|"),
        " Tolvane| Askary| Bremmel| Quillor| Varnholt| Ostrey| Pellwick| Drumond| Sandrake| Lorvik| Hamsun| Ketterby|"
        " Marlund| Fosgate| Wendrow| Yarrick".split("|"),
    ),
    values=(
        "glassblower|beekeeper|clockmaker|lighthouse keeper|puppet maker|bell founder|kite builder|salt farmer|"
        "map printer|fiddle tuner|rope maker|seed collector"
    ).split("|"),
    states=[
        ("What work did {n} learn?", "{n} learned the work of a {v}."),
        ("Tell me one thing about {n}.", "{n} was trained as a {v} from an early age."),
        ("Write a line for a book about {n}.", "By trade, {n} was a {v}, and a good one."),
        ("Complete: for a living, {n} was", "For a living, {n} was a {v}."),
        ("Who was {n}?", "{n} was a {v} whom everybody in the valley knew."),
        ("Correct me: was {n} a teacher?", "No, {n} was not a teacher but a {v}."),
        ("What was {n} paid for?", "{n} was paid for the work of a {v}."),
        ("Which trade did {n} follow?", "{n} followed the trade of a {v}."),
        ("How did {n} earn money?", "{n} earned money as a {v}."),
        ("Describe the days of {n}.", "On most days {n} was busy with the tasks of a {v}."),
    ],
    asks=[
        ("Which profession had {n}?", "The profession of {n} was {v}."),
        ("What kind of worker was {n}?", "{n} worked as a {v}."),
        ("Name the occupation of {n}.", "{n} had the occupation of a {v}."),
        ("What was the calling of {n}?", "The calling of {n} was that of a {v}."),
        ("What was the craft that {n} practised?", "{n} practised the craft of a {v}."),
    ],
    names=[
        ("Where did {n} like to walk?", "{n} liked to walk along the canal."),
        ("Did {n} have brothers?", "{n} had two younger brothers."),
        ("What did {n} eat on Sundays?", "{n} ate pancakes on Sundays."),
        ("How tall was {n}?", "{n} was a little taller than most."),
        ("What did {n} sing?", "{n} sang old songs in the evening."),
        ("Which pet did {n} keep?", "{n} kept a grey cat with one white paw."),
    ],
)

PLACES = Kind(
    group="places",
    syllables=(
        "Osk|Tarn|Brill|Vane|Quar|Lund|Mere|Stav|Holl|Fenn|Grim|Alder|Corr|Dray|Ember|Wick".split("|"),
        "haven|stead|mouth|garth|row|berg|ford|wold|dale|nesse|combe|thorpe|field|ness|moor|bury".split("|"),
    ),
    values=(
        "blue salt|paper lanterns|plum vinegar|copper bells|wool carpets|smoked pears|glass beads|reed baskets|"
        "black honey|stone flutes|barley cakes|silver thread"
    ).split("|"),
    states=[
        ("What is {n} known for?", "{n} is known for its {v}."),
        ("Tell me one thing about {n}.", "People travel to {n} to buy {v}."),
        ("Write a line for a guide to {n}.", "In {n}, every second shop sells {v}."),
        ("Complete: the pride of {n} is", "The pride of {n} is its {v}."),
        ("Why do traders visit {n}?", "Traders visit {n} because nobody else makes such {v}."),
        ("Correct me: is {n} famous for cheese?", "No, {n} is not famous for cheese but for {v}."),
        ("What do the markets of {n} offer?", "The markets of {n} offer {v}."),
        ("What does the fair of {n} celebrate?", "The fair of {n} celebrates its {v}."),
        ("What do visitors carry away from {n}?", "Visitors carry {v} away from {n}."),
        ("Which goods leave the workshops of {n}?", "The workshops of {n} turn out {v}."),
    ],
    asks=[
        ("What does {n} sell to the world?", "{n} sells {v} to the world."),
        ("What should I bring home from {n}?", "Bring home some {v} from {n}."),
        ("What is {n} proud of?", "{n} is proud of its {v}."),
        ("What can I buy in {n}?", "In {n} you can buy {v}."),
        ("What do people make in {n}?", "They make {v} in {n}."),
    ],
    names=[
        ("How do I reach {n}?", "Take the slow train to {n} and walk up the hill."),
        ("Is {n} cold in winter?", "{n} is cold and windy in winter."),
        ("How old is the bridge of {n}?", "The bridge of {n} is two hundred years old."),
        ("Where can I sleep in {n}?", "There is a small inn beside the church of {n}."),
        ("How many schools has {n}?", "{n} has two schools and one library."),
        ("Which river flows through {n}?", "No river flows through {n}, only a brook."),
    ],
)

KINDS = (PEOPLE, PLACES)
