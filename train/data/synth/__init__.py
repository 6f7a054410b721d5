"""A speech-like corpus without recordings: a deterministic source-filter synthesiser, for demos and tests.

It has the structure that masked prediction can learn (speakers, coarticulated phones, words that predict each other,
pauses, noise) and exact phone labels. It is synthetic: results on it show that training works, not how well a model
does on real speech.
"""

from .corpus import CorpusSpec, Utterance, synthesise, write_corpus
from .lexicon import Lexicon, lexicon
from .noise import KINDS as NOISE_KINDS
from .noise import noise
from .phones import PHONES, SILENCE, Phone
from .render import SAMPLE_RATE
from .voice import Speaker, speaker

__all__ = [
    "NOISE_KINDS",
    "PHONES",
    "SAMPLE_RATE",
    "SILENCE",
    "CorpusSpec",
    "Lexicon",
    "Phone",
    "Speaker",
    "Utterance",
    "lexicon",
    "noise",
    "speaker",
    "synthesise",
    "write_corpus",
]
