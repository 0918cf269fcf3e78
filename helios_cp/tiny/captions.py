"""Captions of scenes: templates with synonyms, as plain prompts have them."""

from __future__ import annotations

import random
import string

from helios_cp.tiny.world import Scene

GROUND_WORDS = {
    "sea": ("the sea", "the ocean", "a calm sea", "the waves", "the water"),
    "meadow": ("a green meadow", "a meadow", "a grassy field", "green hills", "the grass"),
    "desert": ("a desert", "the desert", "sand dunes", "a sandy desert", "the dunes"),
    "snow": ("snowy hills", "a snowy field", "the snow", "a snow-covered landscape", "fresh snow"),
}
TIME_WORDS = {
    "day": ("on a sunny day", "by day", "in daylight", "under a blue sky", "in bright daylight", "in the morning"),
    "sunset": ("at sunset", "at dusk", "in the evening light", "under an orange sky", "in the golden evening"),
    "night": ("at night", "under the stars", "under a starry sky", "on a starry night", "by moonlight"),
}
NOUNS = {
    "ball": ("ball", "rubber ball", "beach ball"),
    "balloon": ("balloon", "hot air balloon", "hot-air balloon"),
    "boat": ("boat", "sailing boat", "sailboat"),
    "bird": ("bird", "small bird"),
    "car": ("car", "little car", "small car"),
}
VERBS = {
    "ball": ("bouncing", "bouncing up and down", "jumping", "hopping"),
    "balloon": ("drifting", "floating", "flying", "hovering"),
    "boat": ("sailing", "drifting", "rocking", "moving"),
    "bird": ("flying", "flapping its wings", "soaring", "gliding"),
    "car": ("driving", "rolling", "moving", "speeding"),
}
PREPOSITIONS = {
    "ball": ("on", "over", "across", "in"),
    "balloon": ("over", "above", "across"),
    "boat": ("on", "across", "over"),
    "bird": ("over", "above", "across"),
    "car": ("through", "across", "over", "in"),
}
OPENINGS = ("", "", "", "", "a video of ", "a clip of ", "an animation of ", "a view of ", "a beautiful shot of ")
FILLERS = ("very", "shiny", "bright", "big", "slowly", "gently", "4k", "cinematic", "the", "beautiful", "calm", "with")


def caption(scene: Scene, generator: random.Random) -> tuple[str, dict[str, str | None]]:
    """A sentence about a scene, and its labels with None for what the sentence leaves open.

    A direction is at times unsaid where it is to the right, because prompts rarely name one.
    """
    named: dict[str, str | None] = dict(scene.labels)

    def unless(label: str, chance: float, words: str) -> str:
        if generator.random() >= chance:
            return words
        named[label] = None
        return ""

    place, time = generator.choice(GROUND_WORDS[scene.ground]), generator.choice(TIME_WORDS[scene.time])
    time = unless("time", 0.06, time)
    if scene.subject == "none":
        named |= {"colour": None, "direction": None}
        sentence = generator.choice(
            (f"{place} {time}", f"a view over {place} {time}", f"a landscape with {place} {time}")
        )
    else:
        colour = unless("colour", 0.04, scene.colour)
        where = unless("ground", 0.04, f"{generator.choice(PREPOSITIONS[scene.subject])} {place}")
        way = unless("direction", 0.3 if scene.direction == "right" else 0.0, f"to the {scene.direction}")
        noun, verb = generator.choice(NOUNS[scene.subject]), generator.choice(VERBS[scene.subject])
        article = "the" if generator.random() < 0.08 else "a"
        sentence = generator.choice(
            (
                f"{article} {colour} {noun} {verb} {way} {where} {time}",
                f"{article} {colour} {noun} {verb} {way} {where} {time}",
                f"{article} {colour} {noun} is {verb} {way} {where} {time}",
                f"{time} , {article} {colour} {noun} {verb} {way} {where}",
                f"{where} {time} , {article} {colour} {noun} {verb} {way}",
                f"{article} {colour} {noun} {where} {time} {way}",
            )
        )
    sentence = generator.choice(OPENINGS) + " ".join(sentence.split()).replace(" ,", ",").strip(" ,")
    if generator.random() < 0.5:
        sentence = sentence[:1].upper() + sentence[1:]
    return sentence + ("." if generator.random() < 0.4 else ""), named


def disturbed(text: str, generator: random.Random) -> str:
    """With words that mean nothing here and misprints, because prompts do not look like captions."""
    words = text.split(" ")
    while generator.random() < 0.3:
        words.insert(generator.randrange(len(words) + 1), generator.choice(FILLERS))
    text = " ".join(words)
    if text and generator.random() < 0.1:
        place = generator.randrange(len(text))
        text = text[:place] + generator.choice(string.ascii_lowercase) + text[place + 1 :]
    return text


def plain_prompt(scene: Scene) -> str:
    """The prompt of a scene that names everything, without synonyms: what models are judged on."""
    subject = scene.subject
    words = f"a {scene.colour} {NOUNS[subject][0]} {VERBS[subject][0]} to the {scene.direction}"
    place = f"{PREPOSITIONS[subject][0]} {GROUND_WORDS[scene.ground][0]}"
    return f"{words} {place} {TIME_WORDS[scene.time][0]}"
