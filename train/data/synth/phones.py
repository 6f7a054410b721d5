"""The phone inventory: settings of the vocal tract and its sources for each phone.

A phone is one or more segments in time. A segment sets the first three resonances of the vocal tract (formants, Hz, of
an adult of average length) and the level (dB) of three sources: ``voice`` (glottal pulses through the tract),
``breath`` (noise at the glottis, through the same tract) and ``hiss`` (noise at a constriction, through its own
resonance). Values that are None in a segment are taken from its neighbours. Vowel formants: Peterson and Barney,
"Control methods used in a study of the vowels", JASA 1952; the parametrisation follows Klatt, "Software for a
cascade/parallel formant synthesizer", JASA 1980.
"""

from __future__ import annotations

from dataclasses import dataclass

OFF = -100.0
"""Level of a silent source, dB."""

SILENCE = "sil"

Formants = tuple[float, float, float]


@dataclass(frozen=True)
class Segment:
    """A part of a phone with constant targets."""

    fraction: float  # of the phone's duration
    formants: Formants | None = None  # Hz; None: those of the neighbours
    voice: float = OFF  # dB
    breath: float = OFF  # dB
    hiss: float = OFF  # dB
    hiss_centre: float | None = None  # Hz
    hiss_width: float | None = None  # Hz
    damping: float = 1.0  # factor on the formant bandwidths


@dataclass(frozen=True)
class Phone:
    """A speech sound: its mean duration in seconds and its segments in order."""

    name: str
    seconds: float
    segments: tuple[Segment, ...]
    syllabic: bool = False  # carries pitch accents, and is longer when stressed


def _vowel(name: str, formants: Formants, seconds: float = 0.125) -> Phone:
    return Phone(name, seconds, (Segment(1.0, formants, voice=0.0),), syllabic=True)


def _diphthong(name: str, first: Formants, last: Formants) -> Phone:
    segments = (Segment(0.55, first, voice=0.0), Segment(0.45, last, voice=-1.5))
    return Phone(name, 0.175, segments, syllabic=True)


def _sonorant(name: str, formants: Formants, voice: float, damping: float = 1.0) -> Phone:
    return Phone(name, 0.085, (Segment(1.0, formants, voice=voice, damping=damping),))


def _fricative(name: str, formants: Formants, centre: float, width: float, hiss: float, voice: float = OFF) -> Phone:
    segment = Segment(1.0, formants, voice=voice, hiss=hiss, hiss_centre=centre, hiss_width=width, damping=1.5)
    return Phone(name, 0.085 if voice > OFF else 0.110, (segment,))


def _stop(name: str, locus: Formants, centre: float, width: float, burst: float, voiced: bool) -> Phone:
    """A stop: closure, a burst shaped by the place of articulation, then a voiced or an aspirated release."""
    hiss = {"hiss_centre": centre, "hiss_width": width}
    closure = Segment(0.62 if voiced else 0.55, locus, voice=-16.0 if voiced else OFF, damping=3.0)
    release = Segment(0.20 if voiced else 0.15, locus, hiss=burst, **hiss)
    tail = Segment(0.18, locus, voice=-3.0) if voiced else Segment(0.30, None, breath=-14.0, hiss=burst - 14.0, **hiss)
    return Phone(name, 0.080 if voiced else 0.095, (closure, release, tail))


_ALVEOLAR: Formants = (300.0, 1750.0, 2650.0)
_LABIAL: Formants = (300.0, 950.0, 2250.0)
_VELAR: Formants = (280.0, 1950.0, 2250.0)

_INVENTORY: tuple[Phone, ...] = (
    Phone(SILENCE, 0.300, (Segment(1.0),)),
    _vowel("iy", (270.0, 2290.0, 3010.0)),
    _vowel("ih", (390.0, 1990.0, 2550.0), 0.095),
    _vowel("eh", (530.0, 1840.0, 2480.0), 0.110),
    _vowel("ae", (660.0, 1720.0, 2410.0), 0.140),
    _vowel("ah", (600.0, 1190.0, 2390.0), 0.090),
    _vowel("aa", (730.0, 1090.0, 2440.0), 0.140),
    _vowel("ao", (570.0, 840.0, 2410.0), 0.140),
    _vowel("uw", (300.0, 870.0, 2240.0)),
    _vowel("er", (490.0, 1350.0, 1690.0)),
    _diphthong("ay", (720.0, 1150.0, 2450.0), (350.0, 2050.0, 2650.0)),
    _diphthong("ow", (550.0, 950.0, 2400.0), (330.0, 800.0, 2250.0)),
    _sonorant("w", (290.0, 640.0, 2150.0), -4.0),
    _sonorant("y", (260.0, 2250.0, 3050.0), -4.0),
    _sonorant("l", (350.0, 1000.0, 2850.0), -4.0),
    _sonorant("r", (330.0, 1100.0, 1450.0), -4.0),
    _sonorant("m", (250.0, 1000.0, 2150.0), -8.0, damping=2.5),
    _sonorant("n", (260.0, 1550.0, 2600.0), -8.0, damping=2.5),
    _fricative("s", _ALVEOLAR, 5900.0, 1500.0, -11.0),
    _fricative("sh", (300.0, 1850.0, 2500.0), 3000.0, 900.0, -9.0),
    _fricative("f", _LABIAL, 6800.0, 5000.0, -21.0),
    _fricative("z", _ALVEOLAR, 5900.0, 1500.0, -16.0, voice=-11.0),
    _fricative("v", _LABIAL, 6800.0, 5000.0, -25.0, voice=-9.0),
    Phone("h", 0.070, (Segment(1.0, None, breath=-12.0, damping=1.5),)),
    _stop("p", _LABIAL, 900.0, 1200.0, -12.0, voiced=False),
    _stop("t", _ALVEOLAR, 4500.0, 2200.0, -7.0, voiced=False),
    _stop("k", _VELAR, 1900.0, 600.0, -8.0, voiced=False),
    _stop("b", _LABIAL, 900.0, 1200.0, -15.0, voiced=True),
    _stop("d", _ALVEOLAR, 4300.0, 2200.0, -12.0, voiced=True),
    _stop("g", _VELAR, 1900.0, 600.0, -12.0, voiced=True),
)

PHONES: dict[str, Phone] = {phone.name: phone for phone in _INVENTORY}
"""Phones by name; their order numbers the classes of a phone probe, and silence comes first."""
